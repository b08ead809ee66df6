"""Image files to pixels: the one conversion that preparation, training and sampling share.

Pillow opens files of many depths, but its own conversion of deep ones to 8 bits clips them at 255.
Here integers keep the upper eight bits of their type: those of 16 bits lose the lower byte, signed
ones begin at black with the lowest value of the type, and a PGM ends with white at its maxval.
Floating-point values have no range of their own; a TIFF may state one, others are refused.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image, ImageFile, ImageOps, PngImagePlugin, TiffImagePlugin

from r2id.config.section import MOST_PIXELS
from r2id.errors import SYSTEM_FAULTS, WorkError

Image.MAX_IMAGE_PIXELS = None  # the limits here are checked instead of Pillow's own
# Texts that are left (see _without_texts) may take as much as Pillow allows for all of them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY

_ORIENTATION = 0x0112  # numbers of tags, of EXIF and of TIFF
_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST = 258, 262, 339, 340, 341
_SIGNED = 2  # value of the tag SampleFormat
_WHITE_IS_ZERO = 0  # value of the tag PhotometricInterpretation
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # Pillow scales all that is deeper than 8 bits to 16
_PNG, _PNG_CHUNK = b"\x89PNG\r\n\x1a\n", 12  # bytes of a chunk beside its content
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTING = (b"Raw profile type exif\0", b"Raw profile type APP1\0", b"XML:com.adobe.xmp\0")
# What Pillow calls the values that libtiff returns, and what they are: libtiff swaps their bytes.
_SWAPPED = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


class _Refused(ValueError):
    """An image that is refused for a reason of its own."""


@contextmanager
def decoding() -> Iterator[None]:
    """Turn whatever a decoder raises into a ValueError with the reason.

    Decoders fail in many ways on damaged bytes. Only faults of the system, such as a lack of memory
    or a full disk, become a WorkError.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF, which is harmless here
            yield
    except Image.UnidentifiedImageError:
        raise ValueError("not an image of a format and kind that can be read") from None
    except _Refused:
        raise
    except MemoryError as error:
        raise WorkError("an image cannot be decoded: there is not enough memory") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in SYSTEM_FAULTS:
            raise WorkError(f"an image cannot be decoded: {error}") from error
        words = " ".join(str(error).split())
        raise ValueError(f"not a readable image: {type(error).__name__}: {words}") from None


def open_header(data: bytes, max_pixels: int | None = None) -> ImageFile.ImageFile:
    """Open an image and check its size before its pixels are decoded. Use within ``decoding``."""
    image = Image.open(io.BytesIO(_without_texts(data)))
    if image.height < 1 or image.width < 1:
        raise _Refused(f"an image of {image.height}x{image.width} pixels has none")
    limit = max_pixels or MOST_PIXELS
    if image.height * image.width > limit:
        raise _Refused(
            f"an image of {image.height}x{image.width} pixels, more than the {limit} allowed"
        )
    return image


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; an unreadable one counts as 1, upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # corrupt EXIF fails in many ways, and the pixels are fine
        return 1
    return orientation if orientation in range(1, 9) else 1


def load_upright(image: Image.Image) -> Image.Image:
    """Decode an opened image, or take one in memory, with 8 bits per value, and turn it upright.

    Use within ``decoding``. Raises ValueError for values whose range is not known.
    """
    if isinstance(image, ImageFile.ImageFile):
        image.tile = [_unswapped(tile) for tile in image.tile]
        depth = _png_depth(image)
        image.load()
        _scale_transparent_value(image, depth)
    shallow = _eight_bits(image)
    return ImageOps.exif_transpose(shallow) if orientation_of(shallow) != 1 else shallow


def flatten(image: Image.Image, channels: int | None, background: int = 255) -> Image.Image:
    """Convert an image that ``load_upright`` returned to mode L (1 channel) or RGB (3).

    None takes L for grey images. Transparent pixels are blended with a grey, from 0 (black) to 255
    (white).
    """
    gray = image.mode in ("1", "L", "LA", "La")
    if image.mode == "LAB":  # Pillow converts it to RGB alone
        image = image.convert("RGB")
    if image.has_transparency_data:
        behind = Image.new("RGBA", image.size, (background, background, background, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    mode = "L" if (gray if channels is None else channels == 1) else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale an image to 8 bits per value, if it has more of them or signed ones."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED
    deep = image.mode.startswith("I;16") or image.mode in ("I", "F")
    if not deep and not signed:
        return image
    values = np.asarray(image)
    # One in memory may be all that is left of a file: nothing tells the range of wider values.
    if image.format is None and not image.mode.startswith("I;16"):
        raise _Refused(
            f"an image of mode {image.mode}, whose range is not known; must have 8 or 16 bits"
        )
    if image.mode == "F":
        scaled = _scale_floats(values, tags)
    elif tags or image.format in (None, *_SIXTEEN_BITS):
        bits = tags.get(_BITS, (1,))[0] if tags else 16
        scaled = _upper_bits(values, bits, signed)
    else:
        raise _Refused(f"a {image.format} image of {image.mode} values, whose range is not known")
    if deep and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        scaled = ~scaled  # Pillow has done so where values have 8 bits
    shallow = Image.fromarray(scaled)
    shallow.info = dict(image.info)
    key = shallow.info.pop("transparency", None)
    if key is not None:
        shallow.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)))
    return shallow


def _upper_bits(values: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """Return the upper eight of the ``bits`` of integers as uint8."""
    # Pillow takes signed values of 8 bits for unsigned ones, and unsigned ones of 32 for signed.
    if signed and bits == 8:
        values = values.view(np.int8)
    elif not signed and bits == 32:
        values = values.view(np.uint32)
    lowest = -(1 << (bits - 1)) if signed else 0
    return ((values.astype(np.int64) - lowest) >> (bits - 8)).astype(np.uint8)


def _scale_floats(values: np.ndarray, tags: Mapping[int, Any]) -> np.ndarray:
    """Scale floating-point values to bytes by the range that the tags of a TIFF state."""
    if not np.isfinite(values).all():
        raise _Refused("an image with pixels that are not finite")
    try:
        low, high = float(tags[_LOWEST][0]), float(tags[_HIGHEST][0])
    except (KeyError, IndexError, TypeError, ValueError):
        low = high = 0.0
    if not (np.isfinite([low, high]).all() and low < high):
        raise _Refused(
            "an image of floating-point values whose range the file does not state: convert it to "
            "integers"
        )
    scaled = (values.astype(np.float64) - low) * (255 / (high - low))
    return scaled.round().clip(0, 255).astype(np.uint8)


def _unswapped(tile: ImageFile._Tile) -> ImageFile._Tile:
    """Keep Pillow from swapping the bytes of values that libtiff has swapped already."""
    if tile.codec_name == "libtiff" and isinstance(tile.args, tuple):
        return tile._replace(args=(_SWAPPED.get(tile.args[0], tile.args[0]), *tile.args[1:]))
    return tile


def _png_depth(image: ImageFile.ImageFile) -> int:
    """Return the bits per value of a PNG whose pixels are not decoded yet; 8 for other images."""
    if image.format != "PNG" or not image.tile:
        return 8
    rawmode = str(image.tile[0].args)
    return {"L;2": 2, "L;4": 4, "RGB;16B": 16}.get(rawmode, 8)


def _scale_transparent_value(image: Image.Image, depth: int) -> None:
    """Scale the one value of a PNG that is transparent as Pillow scales the pixels to 8 bits."""
    key = image.info.get("transparency")
    if depth < 8 and isinstance(key, int):
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif depth > 8 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> (depth - 8) for value in key)


def _without_texts(data: bytes) -> bytes:
    """Leave texts and colour profiles out of a PNG, except those that may tell its orientation.

    Pillow refuses images with long ones, such as drawing tools write to keep a whole project.
    """
    if not data.startswith(_PNG):
        return data
    kept, start, position = [], 0, len(_PNG)
    while position + _PNG_CHUNK <= len(data):
        end = position + _PNG_CHUNK + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        if kind in _TEXTS and not data.startswith(_ORIENTING, position + 8):
            kept.append(data[start:position])
            start = end
        position = end
    return b"".join([*kept, data[start:]]) if kept else data
