"""The record of one sample, and the one place where image bytes become pixels.

Stored bytes are the original ones. Height, width and pixels are always those after the EXIF orientation is applied.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

Extension = Literal["jpg", "png", "webp"]

_EXTENSIONS: dict[str | None, Extension] = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Record:
    """One sample. ``key`` holds no dot (webdataset splits names at the first one) and is unique in its split."""

    key: str
    image: bytes
    ext: Extension
    height: int
    width: int
    mode: str
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What inspect finds out. ``ext`` is none when the format is readable but not one that shards store."""

    ext: Extension | None
    height: int
    width: int
    mode: str


def inspect(data: bytes) -> Facts:
    """Decode an image completely. Raises ValueError with the reason when that is impossible."""
    image, facts = _open(data)
    image.close()
    return facts


def decode(data: bytes, channels: int | None = None) -> np.ndarray:
    """Image bytes → uint8 [H, W, C], upright; C is ``channels`` (1 or 3), or what the image has when none.

    What is transparent is laid over white; 16-bit values keep their upper eight bits. Raises ValueError with the
    reason when the bytes are no readable image.
    """
    return to_array(open_upright(data, channels))


def open_upright(data: bytes, channels: int | None = None) -> Image.Image:
    """As decode, but a Pillow image of mode L or RGB."""
    return _convert(_open(data)[0], channels)


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode L or RGB → uint8 [H, W, C]."""
    array = np.array(image)  # a copy: Pillow's own memory cannot be written to, which torch warns of
    return array[:, :, None] if array.ndim == 2 else array


def encode_png(array: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] → PNG."""
    return png_bytes(Image.fromarray(array))


def png_bytes(image: Image.Image) -> bytes:
    """A Pillow image as PNG, pixels unchanged; modes that PNG lacks become RGB."""
    buffer = io.BytesIO()
    modes = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
    (image if image.mode in modes else image.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def as_png(data: bytes) -> bytes:
    """Any readable image, upright, as PNG: for formats that shards do not store (BMP, TIFF, GIF's first frame, …)."""
    return png_bytes(_open(data)[0])


def _open(data: bytes) -> tuple[Image.Image, Facts]:
    """Decoded and upright, with its facts."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF, and of large images; it refuses huge ones itself
            image = Image.open(io.BytesIO(data))
            _check_size(image)
            image.load()
            upright = _turn_upright(image)
    except Image.UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except (OSError, SyntaxError, EOFError, KeyError, IndexError, TypeError, OverflowError, MemoryError,
            Image.DecompressionBombError) as error:  # all of these come out of Pillow for damaged files
        raise ValueError(f"not a readable image: {error}") from None
    return upright, Facts(_EXTENSIONS.get(image.format), upright.height, upright.width, image.mode)


def _check_size(image: Image.Image) -> None:
    if image.height < 1 or image.width < 1:
        raise ValueError(f"an image of {image.height}x{image.width} pixels has none")


def _turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; one that is unreadable is none."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except Exception:  # damaged EXIF fails in many ways, and the pixels are fine
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(_upper_byte(np.asarray(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _over_white(image)
    gray = image.mode in ("1", "L") if channels is None else channels == 1
    mode = "L" if gray else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _upper_byte(values: np.ndarray) -> np.ndarray:
    """16-bit values (which Pillow also hands out as 32-bit ones) → uint8."""
    return (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    gray = image.mode in ("L", "LA", "La")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image.convert("RGBA"))
    return flat.convert("L" if gray else "RGB")
