"""Image bytes become pixels: formats, modes, EXIF orientation, crops, and what is no image."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from r2id.data import records
from r2id.data.records import View, as_png, decode, decode_view, encode_png, inspect


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("size", "mode"), [((1, 1), "L"), ((3, 5), "RGB"), ((7, 2), "L")])
def test_png_keeps_pixels(size, mode):
    shape = (*size, 3) if mode == "RGB" else size
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(pixels)
    assert inspect(data) == records.ImageFacts("png", *size, mode)
    assert np.array_equal(decode(data).squeeze(), pixels.squeeze())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_everywhere(orientation):
    """Each of the eight EXIF orientations, made as a camera does from an upright picture."""
    upright = np.zeros((4, 6), np.uint8)
    upright[0, 0], upright[0, 5], upright[3, 0] = 250, 150, 50
    undo = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: np.transpose,
        6: np.rot90,
        7: lambda a: np.rot90(a, 2).T,
        8: lambda a: np.rot90(a, 3),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(
            Image.fromarray(np.ascontiguousarray(undo[orientation](upright))),
            kind,
            exif=exif,
            **options,
        )
        facts = inspect(data)
        assert (facts.height, facts.width) == (4, 6)
        assert np.array_equal(decode(data, 1)[:, :, 0], upright)


def test_damaged_exif_is_no_reason_to_refuse():
    data = saved(Image.new("L", (3, 2), 9), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data).shape == (2, 3, 1)


def test_transparency_is_laid_over_white():
    half = saved(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))
    assert decode(half, 3).tolist() == [[[255, 255, 255]]]
    assert decode(half, 1).tolist() == [[[255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert decode(saved(palette, transparency=0)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("1", 1, [[[255]]]),
        ("LA", (7, 255), [[[7]]]),
        ("I;16", 0xABCD, [[[0xAB]]]),
        ("RGB", (1, 2, 3), [[[1, 2, 3]]]),
    ],
)
def test_modes(mode, color, expected):
    assert decode(saved(Image.new(mode, (1, 1), color))).tolist() == expected


def test_cmyk_jpeg_becomes_rgb():
    assert decode(saved(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), 3).min() > 250


def test_gray_and_colour_on_request():
    gray, red = saved(Image.new("L", (2, 1), 77)), saved(Image.new("RGB", (2, 1), (255, 0, 0)))
    assert decode(gray, 3).tolist() == [[[77] * 3] * 2]
    assert decode(red, 1).tolist() == [[[76]] * 2]


def test_formats_that_are_not_stored_are_told_apart():
    bitmap = saved(Image.new("RGB", (3, 2), (9, 8, 7)), "BMP")
    assert inspect(bitmap).ext is None
    assert inspect(as_png(bitmap)) == records.ImageFacts("png", 2, 3, "RGB")
    assert np.array_equal(decode(as_png(bitmap)), decode(bitmap))


def damaged():
    good = encode_png(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    photo = saved(Image.effect_noise((64, 64), 90), "JPEG")
    return {
        "text": b"hello, I am no picture",
        "empty": b"",
        "cut PNG": good[:-200],
        "cut JPEG": photo[:-500],
        "no pixels": png_of_size(0, 0),
        "no height": png_of_size(3, 0),
    }


@pytest.mark.parametrize("data", damaged().values(), ids=damaged().keys())
def test_what_is_no_image_gives_a_reason(data):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        inspect(data)
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        decode(data, 1)


def test_an_image_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="60000x60000"):
        inspect(png_of_size(60000, 60000))


def test_a_view_cuts_the_middle_and_keeps_the_shape():
    ramp = encode_png(np.tile(np.arange(0, 200, 2, dtype=np.uint8), (40, 1)))  # 40 x 100
    middle = decode_view(ramp, 1, View(20, 20))[:, :, 0].astype(float)
    assert middle.shape == (20, 20)
    assert np.allclose(
        middle[:, 2:-2], 61 + 4 * np.arange(2, 18), atol=1
    )  # columns 30 to 70, two by two
    assert np.array_equal(decode_view(ramp, 1, View(40, 100)), decode(ramp, 1))
    assert decode_view(ramp, 3, View(1, 1)).shape == (1, 1, 3)


@pytest.mark.parametrize("height", [1, 3, 97, 333])
def test_a_view_of_any_size_from_any_other(height):
    image = encode_png(np.zeros((height, 59), np.uint8))
    for target in ((1, 1), (7, 5), (64, 301)):
        assert decode_view(image, 1, View(*target)).shape == (*target, 1)


@pytest.mark.parametrize("place", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.3, 0.9)])
def test_a_view_at_native_size_is_cut_out_as_it_is(place):
    pixels = np.random.default_rng(0).integers(0, 256, (31, 20), dtype=np.uint8)
    top, left = round(place[0] * (31 - 7)), round(place[1] * (20 - 9))
    cut = decode_view(encode_png(pixels), 1, View(7, 9, 1.0, place))
    assert np.array_equal(cut[:, :, 0], pixels[top : top + 7, left : left + 9])


def photo(height, width):
    """A smooth picture that is unlike its mirror images."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return Image.fromarray(
        np.stack([255 * y, 255 * x, 127 * (1 + np.sin(9 * x * y))], -1).astype(np.uint8)
    )


@pytest.mark.parametrize("orientation", [1, 6, 3])
@pytest.mark.parametrize("size", [(401, 303), (250, 600)])
def test_a_jpeg_decoded_at_a_fraction_shows_the_same(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(photo(*size), "JPEG", quality=95, exif=exif)
    upright = Image.fromarray(decode(data, 3))
    for height, width in ((25, 37), (50, 30), (100, 140)):
        expected = decode_view(png_of(upright), 3, View(height, width)).astype(float)
        small = decode_view(data, 3, View(height, width)).astype(float)
        assert np.abs(small - expected).mean() < 1.0 and np.abs(small - expected).max() < 12


def png_of(image):
    return saved(image, "PNG")


def test_a_jpeg_is_decoded_no_larger_than_needed(monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load

    def watched(image):
        decoded.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    decode_view(saved(photo(800, 600), "JPEG"), 3, View(40, 30))
    assert decoded[0] == (75, 100)


def test_pixels_beyond_the_limit_are_not_decoded():
    data = encode_png(np.zeros((30, 40), np.uint8))
    assert inspect(data, max_pixels=1200).height == 30
    with pytest.raises(ValueError, match=r"30x40 .*1199"):
        inspect(data, max_pixels=1199)
    with pytest.raises(ValueError, match="60000x10"):
        inspect(png_of_size(10, 60000), max_pixels=1000)
