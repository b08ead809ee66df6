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
