"""Files of every depth become the pixels that numpy makes of the same values."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from r2id.data.records import View, as_png, decode, decode_view, inspect
from r2id.images import read_image, to_uint8
from tests.data.image_files import netpbm, png, png_chunk, tiff

SHAPE = (24, 32)


def ramp(kind, shape=SHAPE):
    """Values from the lowest of a type to its highest."""
    kind = np.dtype(kind)
    if kind.kind == "f":
        return np.linspace(0, 1, int(np.prod(shape))).reshape(shape).astype(kind)
    low, high, count = int(np.iinfo(kind).min), int(np.iinfo(kind).max), int(np.prod(shape))
    values = [low + number * (high - low) // (count - 1) for number in range(count)]
    return np.array(values, dtype=kind).reshape(shape)


def upper(values):
    """The upper eight bits of integers, from the lowest value of their type: uint8."""
    lowest = int(np.iinfo(values.dtype).min)
    return ((values.astype(np.int64) - lowest) // 2 ** (8 * values.itemsize - 8)).astype(np.uint8)


def agree(data, expected, path):
    """All ways from a file to pixels lead to the same: decode, shards, loader, reconstruct."""
    expected = expected[:, :, None] if expected.ndim == 2 else expected
    assert np.array_equal(decode(data), expected)
    stored = data if inspect(data).ext else as_png(data)
    assert np.array_equal(decode(stored), expected)
    view = View(*expected.shape[:2])
    assert np.array_equal(decode_view(stored, expected.shape[2], view), expected)
    assert np.array_equal(decode_view(data, expected.shape[2], view), expected)
    path.write_bytes(data)
    read = to_uint8(read_image(path, expected.shape[2])).movedim(0, -1).numpy()
    assert np.array_equal(read, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize(
    ("order", "kind"),
    [
        *(("<", kind) for kind in ("u1", "i1", "u2", "i2", "u4", "i4")),
        *((">", kind) for kind in ("u1", "i1", "u2", "i2", "i4")),
    ],
)
def test_grey_tiffs_are_scaled_by_the_range_of_their_type(tmp_path, order, kind, packed):
    values = ramp(kind)
    assert upper(values).mean() == pytest.approx(127.5, abs=1)
    agree(tiff(values, order, packed=packed), upper(values), tmp_path / "x.tif")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_a_tiff_whose_zero_is_white(tmp_path, kind, packed):
    values = ramp(kind)
    data = tiff(values, photometric=0, packed=packed)
    agree(data, 255 - upper(values), tmp_path / "x.tif")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_colour_tiffs_keep_the_upper_byte(tmp_path, order, kind, packed):
    values = ramp(kind, (*SHAPE, 3))
    agree(tiff(values, order, packed=packed), upper(values), tmp_path / "x.tif")
    opaque = np.concatenate([values, np.full((*SHAPE, 1), np.iinfo(kind).max, kind)], axis=2)
    agree(tiff(opaque, order, packed=packed, alpha=2), upper(values), tmp_path / "x.tif")


def test_a_tiff_of_twelve_bits(tmp_path):
    values = np.linspace(0, 4095, SHAPE[0] * SHAPE[1]).astype(np.uint16).reshape(SHAPE)
    first, second = values.ravel()[::2].astype(int), values.ravel()[1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1)
    data = tiff(values, bits=12, data=packed.astype(np.uint8).tobytes())
    agree(data, (values >> 4).astype(np.uint8), tmp_path / "x.tif")


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "deflated"])
def test_floating_point_values_need_a_range(tmp_path, order, packed):
    values = ramp("f4")
    with pytest.raises(ValueError, match="floating-point values whose range"):
        decode(tiff(values, order, packed=packed))
    with pytest.raises(ValueError, match="floating-point values whose range"):
        as_png(tiff(values, order, packed=packed))
    stated = [(340, "f", [0.0]), (341, "f", [1.0])]
    expected = np.round(values.astype(np.float64) * 255).astype(np.uint8)
    agree(tiff(values, order, packed=packed, extra=stated), expected, tmp_path / "x.tif")
    wrong = [(340, "f", [1.0]), (341, "f", [1.0])]
    with pytest.raises(ValueError, match="floating-point values whose range"):
        decode(tiff(values, order, packed=packed, extra=wrong))
    values[3, 4] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        decode(tiff(values, order, packed=packed, extra=stated))


def other_formats():
    """Files of values whose range Pillow does not tell."""
    deep = Image.fromarray(ramp("u2"))
    floats = Image.fromarray(ramp("f4"))
    im, spider, pfm = io.BytesIO(), io.BytesIO(), io.BytesIO()
    deep.save(im, "IM")
    floats.save(spider, "SPIDER")
    floats.save(pfm, "PPM")
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 32", "NAXIS2  = 24", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode() + ramp(">i2").tobytes()
    return {
        "IM": im.getvalue(),
        "SPIDER": spider.getvalue(),
        "PFM": pfm.getvalue(),
        "FITS": fits.ljust(5760, b"\0"),
    }


@pytest.mark.parametrize("data", other_formats().values(), ids=other_formats().keys())
def test_values_of_an_unknown_range_are_refused(data):
    with pytest.raises(ValueError, match="range"):
        decode(data)
    with pytest.raises(ValueError, match="range"):
        as_png(data)


@pytest.mark.parametrize("kind", ["f8", "f2", "u8"])
def test_tiffs_that_are_not_read_are_refused(kind):
    with pytest.raises(ValueError, match="not an image of a format and kind"):
        inspect(tiff(ramp(kind)))


@pytest.mark.parametrize("plain", [False, True], ids=["binary", "text"])
@pytest.mark.parametrize("colours", [(), (3,)], ids=["PGM", "PPM"])
@pytest.mark.parametrize("most", [1, 7, 100, 255, 256, 1023, 4095, 40000, 65535])
def test_netpbm_images_are_scaled_by_their_maxval(tmp_path, most, colours, plain):
    shape = (*SHAPE, *colours)
    values = np.linspace(0, most, int(np.prod(shape))).round().astype(np.uint16).reshape(shape)
    data = netpbm(values, most, plain)
    expected = values.astype(np.float64) * 255 / most
    found = decode(data)
    assert np.abs(found.reshape(shape) - expected).max() <= 1 and found.max() == 255
    assert found.mean() == pytest.approx(expected.mean(), abs=0.6)
    agree(data, found, tmp_path / "x.pgm")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_pngs_of_every_depth(tmp_path, depth):
    most = 2**depth - 1
    values = np.linspace(0, most, 24 * 32).astype(np.uint16).reshape(SHAPE)
    expected = (values >> 8 if depth == 16 else values * 255 // most).astype(np.uint8)
    agree(png(values, depth), expected, tmp_path / "x.png")
    # one value of them is transparent, which is shown as white
    key = int(values[10, 10])
    data = png(values, depth, before=[(b"tRNS", struct.pack(">H", key))])
    agree(data, np.where(values == key, 255, expected).astype(np.uint8), tmp_path / "x.png")


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colour_and_transparent_pngs(tmp_path, depth, channels):
    values = ramp(f"u{depth // 8}", (*SHAPE, channels))
    shown = upper(values)
    if channels == 3:
        key = values[5, 5]
        clear = (shown == shown[5, 5]).all(axis=2, keepdims=True)
        data = png(values, depth, before=[(b"tRNS", key.astype(">u2").tobytes())])
        agree(data, np.where(clear, 255, shown).astype(np.uint8), tmp_path / "x.png")
        agree(png(values, depth), shown, tmp_path / "x.png")
        return
    alpha = shown[:, :, -1:].astype(float) / 255
    expected = shown[:, :, :-1] * alpha + 255 * (1 - alpha)
    found = decode(png(values, depth))
    assert np.abs(found - expected).max() <= 1
    agree(png(values, depth), found, tmp_path / "x.png")


def test_a_jpeg_2000_of_sixteen_bits(tmp_path):
    file = io.BytesIO()
    Image.fromarray(ramp("u2")).save(file, "JPEG2000")
    agree(file.getvalue(), upper(ramp("u2")), tmp_path / "x.jp2")


def modes_in_formats():
    """A file of each mode in each format that Pillow writes it as, and can read again."""
    colours = Image.fromarray(ramp("u1", (*SHAPE, 3)))
    files = {}
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB"):
        image = Image.merge("LAB", colours.split()) if mode == "LAB" else colours.convert(mode)
        for kind in ("PNG", "TIFF", "BMP", "GIF", "TGA", "WEBP", "PCX", "SGI", "ICO"):
            file = io.BytesIO()
            with contextlib.suppress(OSError, KeyError, ValueError):
                image.save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
                Image.open(file).load()  # Pillow 12 cannot read its own YCbCr TIFF
                files[f"{mode} {kind}"] = file.getvalue()
    return files


@pytest.mark.parametrize("data", modes_in_formats().values(), ids=modes_in_formats().keys())
def test_every_mode_in_every_format(tmp_path, data):
    """It is shown as Pillow shows it over white."""
    with Image.open(io.BytesIO(data)) as opened:
        over = opened.convert("RGBA")
        white = Image.new("RGBA", over.size, "white")
        expected = np.asarray(Image.alpha_composite(white, over).convert("RGB"))
    assert np.array_equal(decode(data, 3), expected)
    agree(data, decode(data), tmp_path / "x")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_images_are_turned_upright(orientation, tmp_path):
    values = ramp("u2")
    exif = Image.Exif()
    exif[0x0112] = orientation
    body = exif.tobytes().removeprefix(b"Exif\0\0")
    shown = decode(png(values, 16, before=[(b"eXIf", body)]))
    same = decode(png(upper(values), 8, before=[(b"eXIf", body)]))
    assert np.array_equal(shown, same) and shown.shape[:2] == SHAPE[:: -1 if orientation > 4 else 1]
    turned = tiff(values, extra=[(274, "H", [orientation])])
    agree(turned, same[:, :, 0], tmp_path / "x.tif")


PIXELS = ramp("u1", (*SHAPE, 3))
WORDS = np.random.default_rng(0).integers(32, 127, 3_000_000, dtype=np.uint8).tobytes()
LONG = {
    "text": (b"tEXt", b"workflow\0" + WORDS),
    "packed text": (b"zTXt", b"workflow\0\0" + zlib.compress(WORDS)),
    "packed bomb": (b"zTXt", b"workflow\0\0" + zlib.compress(bytes(300_000_000))),
    "unicode": (b"iTXt", b"prompt\0\1\0\0\0" + zlib.compress(WORDS)),
    "much text": (b"iTXt", b"prompt\0\0\0\0\0" + WORDS * 30),
    "profile": (b"iCCP", b"ICC\0\0" + zlib.compress(WORDS)),
    "broken profile": (b"iCCP", b"ICC\0\0" + b"no deflate"),
    "layout of a photograph": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(WORDS)),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("chunk", LONG.values(), ids=LONG.keys())
def test_a_png_with_megabytes_of_text_is_like_others(chunk, place):
    data = png(PIXELS, **{place: [chunk]})
    assert inspect(data).ext == "png" and np.array_equal(decode(data), PIXELS)
    assert np.array_equal(decode_view(data, 3, View(*SHAPE)), PIXELS)


def test_a_text_that_says_how_an_image_lies_is_read():
    packet = b'<x xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    turned = png(PIXELS, before=[(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + packet)])
    assert (inspect(turned).height, inspect(turned).width) == SHAPE[::-1]


def test_a_text_that_is_cut_or_damaged_is_no_reason_to_refuse():
    whole = png(PIXELS)
    text = png_chunk(b"tEXt", b"comment\0" + b"x" * 1000)
    assert np.array_equal(decode(whole[:-12] + text[:500]), PIXELS)
    assert np.array_equal(decode(whole[:-12] + text[:-4] + b"9999" + whole[-12:]), PIXELS)
    with pytest.raises(ValueError, match="not a readable image"):
        decode(text[:0] + whole[:-60])
