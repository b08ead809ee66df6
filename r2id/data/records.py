"""The record of one sample, and the decoding of image bytes into pixels.

EXIF policy: image bytes are stored as they came, orientation tag included. Height, width and pixels
are always those of the upright image. Decoders differ in this (OpenCV rotates, Pillow does not), so
all code that needs pixels or sizes uses this module.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL import Image

from r2id.data.pixels import decoding, flatten, load_upright, open_header, orientation_of

Extension = Literal["jpg", "png", "webp"]

_EXTENSIONS: dict[str | None, Extension] = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
}
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
    with decoding():
        return _open(data, max_pixels)[1]


def decode(data: bytes, channels: int | None = None, background: int = 255) -> np.ndarray:
    """Decode image bytes to uint8 [H, W, C], upright.

    C is ``channels`` (1 or 3); None takes 1 for greyscale images and 3 for others. Transparent
    pixels are blended with a grey, by default white; values of more bits keep the upper eight (see
    r2id.data.pixels). Raises ValueError with the reason when the bytes are no readable image.
    """
    with decoding():
        return to_array(flatten(_open(data)[0], channels, background))


@dataclass(frozen=True)
class View:
    """How to cut an image: scale it upright, then crop ``height`` × ``width`` pixels."""

    height: int
    width: int
    scale: float | None = None
    """Factor for both sides; None is the smallest with which the image still covers the crop."""
    position: tuple[float, float] = (0.5, 0.5)
    """Vertical and horizontal position of the crop: 0 at the top or left edge, 1 at the other."""


def decode_view(data: bytes, channels: int, view: View) -> np.ndarray:
    """Decode a crop: image bytes → uint8 [view.height, view.width, channels].

    Colours and errors are those of ``decode``. Scaling is bicubic with antialiasing; a view that is
    not scaled is cut out unchanged. A JPEG more than twice as large as needed is decoded at 1/2,
    1/4 or 1/8 of its size, which leaves out high frequencies and saves most of the time.
    """
    with decoding():
        image = open_header(data)
        full = image.size
        extent: tuple[float, float] | None = None
        if image.format == "JPEG" and orientation_of(image) == 1:
            scale = view.scale or max(view.height / image.height, view.width / image.width)
            needed = [math.ceil(_JPEG_MARGIN * side * scale) for side in full]
            reduced = image.draft(None, (needed[0], needed[1]))
            extent = reduced[1][2:] if reduced else None
        upright = flatten(load_upright(image), channels)
        width, height = full if extent else upright.size
        scale = view.scale or max(view.height / height, view.width / width)
        extent = extent or upright.size
        shown = _cut(upright, extent, view, extent[0] / width / scale)
        return to_array(shown)


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
    """Encode a Pillow image as PNG; modes that PNG lacks are converted to grey or RGB."""
    buffer = io.BytesIO()
    if image.mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        image.save(buffer, format="PNG")
    else:  # a profile of other colours, such as those of printers, would no longer fit
        flatten(image, None).save(buffer, format="PNG", icc_profile=None)
    return buffer.getvalue()


def as_png(data: bytes) -> bytes:
    """Convert an image to an upright PNG, if shards do not store its format (BMP, TIFF, …)."""
    with decoding():
        return png_bytes(_open(data)[0])


def _open(data: bytes, max_pixels: int | None = None) -> tuple[Image.Image, ImageFacts]:
    """Decode an image, turn it upright and return it with its facts."""
    image = open_header(data, max_pixels)
    mode = image.mode
    upright = load_upright(image)
    return upright, ImageFacts(_EXTENSIONS.get(image.format), upright.height, upright.width, mode)
