"""The record of one sample, and the decoding of image bytes into pixels.

EXIF policy: image bytes are stored as they came, orientation tag included. Height, width and pixels
are always those of the upright image. Decoders differ in this (OpenCV rotates, Pillow does not), so
all code that needs pixels or sizes uses this module.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

Extension = Literal["jpg", "png", "webp"]

_EXTENSIONS: dict[str | None, Extension] = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}
_ORIENTATION = 0x0112  # number of the EXIF tag
_MOST_PIXELS = 400_000_000  # where the caller sets no limit; 1.2 GB when decoded
Image.MAX_IMAGE_PIXELS = None  # the limits here are checked instead of Pillow's own
_JPEG_MARGIN = 2  # a JPEG is decoded at a fraction only if that is this many times the size needed


@dataclass(frozen=True)
class Record:
    """One sample as it is stored in a shard.

    ``key`` is unique in its split and contains no dot: webdataset splits the names of members at
    the first dot, so ``img.v2.jpg`` and ``img.v3.jpg`` would become one sample.
    """

    key: str
    image: bytes
    ext: Extension
    height: int
    width: int
    mode: str
    label: int | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    attributes: tuple[int, ...] | None = None
    """−1 or 1 for each of the set's attributes."""
    embedding: np.ndarray | None = None
    """Text embedding, float16 [D] or [T, D], of one shape throughout the set."""


@dataclass(frozen=True)
class ImageFacts:
    """What ``inspect`` returns. ``ext`` is None for a readable format that shards do not store."""

    ext: Extension | None
    height: int
    width: int
    mode: str


def inspect(data: bytes, max_pixels: int | None = None) -> ImageFacts:
    """Decode an image completely and return its facts.

    Raises ValueError with the reason when it cannot be decoded, or when its header states more than
    ``max_pixels`` pixels; such an image is not decoded.
    """
    image, facts = _open(data, max_pixels)
    image.close()
    return facts


def decode(data: bytes, channels: int | None = None) -> np.ndarray:
    """Decode image bytes to uint8 [H, W, C], upright.

    C is ``channels`` (1 or 3); None takes 1 for greyscale images and 3 for others. Transparent
    pixels are blended with white, 16-bit values keep their upper eight bits. Raises ValueError with
    the reason when the bytes are no readable image.
    """
    return to_array(_convert(_open(data)[0], channels))


@dataclass(frozen=True)
class View:
    """How to cut an image: scale it upright, then crop ``height`` × ``width`` pixels."""

    height: int
    width: int
    scale: float | None = None
    """Factor for both sides; None is the smallest with which the image still covers the crop."""
    position: tuple[float, float] = (0.5, 0.5)
    """Vertical and horizontal position of the crop: 0 at the top or left edge, 1 at the other."""
    mirrored: bool = False


def decode_view(data: bytes, channels: int, view: View) -> np.ndarray:
    """Decode a crop: image bytes → uint8 [view.height, view.width, channels].

    Colours and errors are those of ``decode``. Scaling is bicubic with antialiasing; a view that is
    not scaled is cut out unchanged. A JPEG more than twice as large as needed is decoded at 1/2,
    1/4 or 1/8 of its size, which leaves out high frequencies and saves most of the time.
    """
    with _as_value_error():
        image = _open_header(data)
        orientation = _orientation(image)
        height, width = image.size if orientation > 4 else image.size[::-1]  # 5 to 8 swap the sides
        scale = view.scale or max(view.height / height, view.width / width)
        extent: tuple[float, float] = (width, height)
        if orientation == 1 and image.format == "JPEG":
            needed = (
                math.ceil(_JPEG_MARGIN * width * scale),
                math.ceil(_JPEG_MARGIN * height * scale),
            )
            reduced = image.draft(None, needed)
            extent = reduced[1][2:] if reduced else extent
        image.load()
        upright = _convert(_turn_upright(image), channels)
        shown = _cut(upright, extent, view, extent[0] / width / scale)
    return to_array(ImageOps.mirror(shown) if view.mirrored else shown)


def _cut(image: Image.Image, extent: tuple[float, float], view: View, shrink: float) -> Image.Image:
    """Cut a view out of an image; ``shrink`` is the number of its pixels per pixel of the view.

    ``extent`` is the true (width, height) of the picture, which may be fractional: a JPEG that is
    decoded at a fraction of its size may end in the middle of a pixel.
    """
    width, height = min(extent[0], view.width * shrink), min(extent[1], view.height * shrink)
    top, left = (extent[1] - height) * view.position[0], (extent[0] - width) * view.position[1]
    if (width, height) == (view.width, view.height):
        # Not scaled: whole pixels are copied unchanged.
        left, top = round(left), round(top)
        return image.crop((left, top, left + view.width, top + view.height))
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return image.resize((view.width, view.height), Image.Resampling.BICUBIC, box=box)


def to_array(image: Image.Image) -> np.ndarray:
    """Convert a Pillow image of mode L or RGB to uint8 [H, W, C]."""
    array = np.array(image)  # a copy: Pillow's own memory is read-only, which torch warns of
    return array[:, :, None] if array.ndim == 2 else array


def encode_png(array: np.ndarray) -> bytes:
    """Encode uint8 [H, W] or [H, W, 3] as PNG."""
    return png_bytes(Image.fromarray(array))


def png_bytes(image: Image.Image) -> bytes:
    """Encode a Pillow image as PNG; modes that PNG lacks are converted to RGB."""
    buffer = io.BytesIO()
    modes = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")
    (image if image.mode in modes else image.convert("RGB")).save(buffer, format="PNG")
    return buffer.getvalue()


def as_png(data: bytes) -> bytes:
    """Convert an image to an upright PNG, if shards do not store its format (BMP, TIFF, …)."""
    return png_bytes(_open(data)[0])


def _open(data: bytes, max_pixels: int | None = None) -> tuple[Image.Image, ImageFacts]:
    """Decode an image, turn it upright and return it with its facts."""
    with _as_value_error():
        image = _open_header(data, max_pixels)
        image.load()
        upright = _turn_upright(image)
    return upright, ImageFacts(
        _EXTENSIONS.get(image.format), upright.height, upright.width, image.mode
    )


@contextmanager
def _as_value_error() -> Iterator[None]:
    """Turn every error that Pillow raises for damaged files into a ValueError with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of corrupt EXIF, which is harmless here
            yield
    except Image.UnidentifiedImageError:
        raise ValueError("not an image of a known format") from None
    except (
        OSError,
        SyntaxError,
        EOFError,
        KeyError,
        IndexError,
        TypeError,
        OverflowError,
        MemoryError,
        struct.error,
    ) as error:
        raise ValueError(f"not a readable image: {error}") from None


def _open_header(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """Open an image and check its size before its pixels are decoded."""
    image = Image.open(io.BytesIO(data))
    if image.height < 1 or image.width < 1:
        raise ValueError(f"an image of {image.height}x{image.width} pixels has none")
    limit = max_pixels or _MOST_PIXELS
    if image.height * image.width > limit:
        raise ValueError(
            f"an image of {image.height}x{image.width} pixels, more than the {limit} allowed"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; an unreadable one counts as 1, upright."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # corrupt EXIF fails in many ways, and the pixels are fine
        return 1
    return orientation if orientation in range(1, 9) else 1


def _turn_upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _orientation(image) != 1 else image


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
    """Convert an image to mode L or RGB; see ``decode``."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("an image with pixels that are not finite")
        image = Image.fromarray(_upper_byte(values))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = _over_white(image)
    gray = image.mode in ("1", "L") if channels is None else channels == 1
    mode = "L" if gray else "RGB"
    return image if image.mode == mode else image.convert(mode)


def _upper_byte(values: np.ndarray) -> np.ndarray:
    """Convert 16-bit values, which Pillow may hold in 32 bits, to uint8."""
    return (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    """Blend an image with white where it is transparent."""
    gray = image.mode in ("L", "LA", "La")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image.convert("RGBA"))
    return flat.convert("L" if gray else "RGB")
