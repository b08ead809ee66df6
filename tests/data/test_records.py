import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from r2id.data import records
from r2id.data.records import as_png, decode, encode_png, inspect


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width, height):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))


@pytest.mark.parametrize(("size", "mode"), [((1, 1), "L"), ((3, 5), "RGB"), ((7, 2), "L")])
def test_png_keeps_pixels(size, mode):
    shape = (*size, 3) if mode == "RGB" else size
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = encode_png(pixels)
    assert inspect(data) == records.Facts("png", *size, mode)
    assert np.array_equal(decode(data).squeeze(), pixels.squeeze())


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_everywhere(orientation):
    """The eight orientations of EXIF, each the inverse of what a camera did to an upright picture."""
    upright = np.zeros((4, 6), np.uint8)
    upright[0, 0], upright[0, 5], upright[3, 0] = 250, 150, 50
    undo = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
            6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = saved(Image.fromarray(np.ascontiguousarray(undo[orientation](upright))), kind, exif=exif, **options)
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


@pytest.mark.parametrize(("mode", "color", "expected"), [
    ("1", 1, [[[255]]]), ("LA", (7, 255), [[[7]]]), ("I;16", 0xABCD, [[[0xAB]]]), ("RGB", (1, 2, 3), [[[1, 2, 3]]])])
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
    assert inspect(as_png(bitmap)) == records.Facts("png", 2, 3, "RGB")
    assert np.array_equal(decode(as_png(bitmap)), decode(bitmap))


def damaged():
    good = encode_png(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8))
    photo = saved(Image.effect_noise((64, 64), 90), "JPEG")
    return {"text": b"hello, I am no picture", "empty": b"", "cut PNG": good[:-200], "cut JPEG": photo[:-500],
            "no pixels": png_of_size(0, 0), "no height": png_of_size(3, 0)}


@pytest.mark.parametrize("data", damaged().values(), ids=damaged().keys())
def test_what_is_no_image_gives_a_reason(data):
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        inspect(data)
    with pytest.raises(ValueError, match=r"\w+ \w+"):
        decode(data, 1)


def test_an_image_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="exceeds limit"):
        inspect(png_of_size(60000, 60000))
