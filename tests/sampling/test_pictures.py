"""Pictures in memory are read as the files that they came from."""

import numpy as np
import pytest
import torch
from PIL import Image

from r2id.errors import InputError
from r2id.images import to_uint8
from r2id.sampling.pictures import read_mask, read_picture

RAMP = np.linspace(0, 65535, 24).astype(np.uint16).reshape(4, 6)


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    deep, file = Image.fromarray(RAMP), tmp_path / "deep.png"
    deep.save(file)
    for picture in (deep, file, Image.open(file).crop((0, 0, 6, 4))):
        assert np.array_equal(to_uint8(read_picture(picture, 1))[0].numpy(), RAMP >> 8)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_a_picture_whose_range_is_not_known_is_refused(kind):
    picture = Image.fromarray(np.eye(4, dtype=kind))
    message = f"an image of mode {picture.mode}, whose range is not known; must have 8 or 16 bits"
    with pytest.raises(InputError, match=f"^picture: {message}$"):
        read_picture(picture, 1)
    with pytest.raises(InputError, match=f"^mask: {message}$"):
        read_mask(picture)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_pictures_made_of_a_turned_file_are_turned(tmp_path, kind):
    turned, file = Image.Exif(), tmp_path / f"turned.{kind}"
    turned[0x0112] = 6
    Image.fromarray((RAMP >> 8).astype(np.uint8)).save(file, exif=turned)
    expected = read_picture(file, 1)
    assert expected.shape == (1, 6, 4)
    with Image.open(file) as opened:
        for picture in (opened.copy(), opened.convert("L"), opened.resize(opened.size), opened):
            assert torch.equal(read_picture(picture, 1), expected)


def test_what_is_transparent_in_a_mask_is_black(tmp_path):
    layer, file = np.zeros((4, 6, 4), np.uint8), tmp_path / "layer.png"
    layer[1:3, 2:] = 255
    Image.fromarray(layer).save(file)
    for mask in (Image.fromarray(layer), file):
        assert np.array_equal(read_mask(mask)[0].numpy(), layer[..., 3] > 0)
        assert read_picture(mask, 1).min() == 1, "behind pictures it is white"


def test_arrays_of_bytes_are_read_as_pictures_of_pillow():
    colours = np.random.default_rng(0).integers(0, 256, (4, 6, 4), np.uint8)
    for array in (colours, colours[..., :3], colours[..., 0], colours[::-1, ::2, 1]):
        for channels in (1, 3):
            expected = read_picture(Image.fromarray(array), channels)
            for given in (array, torch.from_numpy(array.copy())):
                assert torch.equal(read_picture(given, channels), expected)
    assert torch.equal(read_picture(colours[..., :1], 1), read_picture(colours[..., 0], 1))
    frozen = np.asarray(Image.fromarray(colours[..., 0]))  # read-only
    assert torch.equal(read_picture(frozen, 1), read_picture(colours[..., 0], 1))


def test_floats_are_what_models_see():
    given = torch.rand(3, 4, 6, requires_grad=True) * 2 - 1
    for same in (given, given.detach().double().numpy()):
        found = read_picture(same, 3)
        assert found.dtype == torch.float32 and not found.requires_grad
        assert torch.equal(found, given.detach())
    found.zero_()
    assert given.abs().max() > 0, "a copy"


def test_arrays_are_masks():
    drawn = np.arange(24).reshape(4, 6) % 5 == 0
    for mask in (drawn, torch.from_numpy(drawn), drawn * np.uint8(255), drawn * np.uint8(128)):
        assert np.array_equal(read_mask(mask)[0].numpy(), drawn)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((8, 8)), r"float64 \[8, 8\]: floats must be \[3, H, W\], from −1 to 1"),
        (torch.zeros(1, 3, 8, 8), r"picture of float32 \[1, 3, 8, 8\]: floats must be \[3, H, W\]"),
        (torch.zeros(8, 8, 3), r"\[8, 8, 3\]: floats must be \[3, H, W\]"),
        (torch.zeros(3, 0, 8), r"\[3, 0, 8\]: floats must be"),
        (torch.full((3, 8, 8), 255.0), "picture of floats from 255 to 255: must be from −1 to 1"),
        (torch.full((3, 8, 8), torch.nan), "picture of floats from nan to nan: must be"),
        (np.zeros((8, 8), np.int64), r"picture of int64 \[8, 8\]: must be uint8 \[H, W\] or"),
        (np.zeros((3, 8, 8), np.uint8), r"uint8 \[3, 8, 8\]: must be .* with C 1, 3 or 4"),
        (np.zeros((0, 8), np.uint8), r"picture of size \(0, 8\)"),
        (np.zeros((8, 8), bool), r"picture of bool \[8, 8\]: must be uint8"),
        (np.array(["a"]), "picture of <U1: must be numbers"),
        ([[0, 1]], "picture of type list: must be one of Pillow, a file's path, or an array"),
    ],
)
def test_other_arrays_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        read_picture(given, 3)


def test_floats_are_no_masks():
    with pytest.raises(InputError, match=r"mask of float32 \[1, 8, 8\]: .* or bool \[H, W\]"):
        read_mask(torch.zeros(1, 8, 8))
