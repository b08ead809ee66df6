"""The record of one sample, and the one place where image bytes become pixels.

Stored bytes are the original ones. Height, width and pixels are always those after the EXIF orientation is applied.
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
_ORIENTATION = 0x0112
_MOST_PIXELS = 400_000_000  # of an image that nobody has set a limit for: 1.2 GB when decoded
Image.MAX_IMAGE_PIXELS = (
    None  # a limit of Pillow's own, which could only be lower than the one that is asked for
)
_GAP = 2  # pixels per pixel needed, each way, that a JPEG decoded at a fraction still has


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
    attributes: tuple[int, ...] | None = None
    """One value for each of the set's attributes, −1 or 1."""
    embedding: np.ndarray | None = None
    """Of a text: float16 [D] or [T, D], of one shape throughout the set."""


@dataclass(frozen=True)
class Facts:
    """What inspect finds out. ``ext`` is none when the format is readable but not one that shards store."""

    ext: Extension | None
    height: int
    width: int
    mode: str


def inspect(data: bytes, max_pixels: int | None = None) -> Facts:
    """Decode an image completely. Raises ValueError with the reason when that is impossible, or when its header states
    more than ``max_pixels`` pixels, which are then not decoded."""
    image, facts = _open(data, max_pixels)
    image.close()
    return facts


def decode(data: bytes, channels: int | None = None) -> np.ndarray:
    """Image bytes → uint8 [H, W, C], upright; C is ``channels`` (1 or 3), or what the image has when none.

    What is transparent is laid over white; 16-bit values keep their upper eight bits. Raises ValueError with the
    reason when the bytes are no readable image.
    """
    return to_array(_convert(_open(data)[0], channels))


@dataclass(frozen=True)
class View:
    """What is shown of an upright image: ``height`` × ``width`` pixels of it as it is when its sides are scaled."""

    height: int
    width: int
    scale: float | None = None
    """None is the least that lets the image cover the view."""
    place: tuple[float, float] = (0.5, 0.5)
    """Where the view lies in what the image has left over, vertically and horizontally: 0 top or left, ½ the middle."""
    mirrored: bool = False


def decode_view(data: bytes, channels: int, view: View) -> np.ndarray:
    """Image bytes → uint8 [view.height, view.width, channels]; colours and errors as in decode.

    A JPEG of more than twice the size that is needed is decoded at 1/2, 1/4 or 1/8 by leaving out frequencies. Bicubic
    after that, widened where it shrinks, so that nothing aliases; a view that is not scaled is cut out as it is.
    """
    with _reasons():
        image = _open_header(data)
        turned = _is_turned(image)
        height, width = image.size if turned > 4 else image.size[::-1]
        scale = view.scale or max(view.height / height, view.width / width)
        extent: tuple[float, float] = (width, height)
        if turned == 1 and image.format == "JPEG":
            reduced = image.draft(
                None, (math.ceil(_GAP * width * scale), math.ceil(_GAP * height * scale))
            )
            extent = reduced[1][2:] if reduced else extent
        image.load()
        upright = _convert(_turn_upright(image), channels)
        shown = _cut(upright, extent, view, extent[0] / width / scale)
    return to_array(ImageOps.mirror(shown) if view.mirrored else shown)


def _cut(image: Image.Image, extent: tuple[float, float], view: View, shrink: float) -> Image.Image:
    """The view out of an image, of which ``extent`` (width, height) is the picture; ``shrink`` is its pixels per pixel of
    the view."""
    width, height = min(extent[0], view.width * shrink), min(extent[1], view.height * shrink)
    top, left = (extent[1] - height) * view.place[0], (extent[0] - width) * view.place[1]
    if (width, height) == (view.width, view.height):
        left, top = round(left), round(top)
        return image.crop((left, top, left + view.width, top + view.height))
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return image.resize((view.width, view.height), Image.Resampling.BICUBIC, box=box)


def to_array(image: Image.Image) -> np.ndarray:
    """A Pillow image of mode L or RGB → uint8 [H, W, C]."""
    array = np.array(
        image
    )  # a copy: Pillow's own memory cannot be written to, which torch warns of
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


def _open(data: bytes, max_pixels: int | None = None) -> tuple[Image.Image, Facts]:
    """Decoded and upright, with its facts."""
    with _reasons():
        image = _open_header(data, max_pixels)
        image.load()
        upright = _turn_upright(image)
    return upright, Facts(_EXTENSIONS.get(image.format), upright.height, upright.width, image.mode)


@contextmanager
def _reasons() -> Iterator[None]:
    """Whatever comes out of Pillow for damaged files, as a ValueError with the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF
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
    """The image before its pixels are decoded."""
    image = Image.open(io.BytesIO(data))
    if image.height < 1 or image.width < 1:
        raise ValueError(f"an image of {image.height}x{image.width} pixels has none")
    limit = max_pixels or _MOST_PIXELS
    if image.height * image.width > limit:
        raise ValueError(
            f"an image of {image.height}x{image.width} pixels, more than the {limit} allowed"
        )
    return image


def _is_turned(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; one that is unreadable is 1, upright."""
    try:
        turned = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF fails in many ways, and the pixels are fine
        return 1
    return turned if turned in range(1, 9) else 1


def _turn_upright(image: Image.Image) -> Image.Image:
    return ImageOps.exif_transpose(image) if _is_turned(image) != 1 else image


def _convert(image: Image.Image, channels: int | None) -> Image.Image:
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
    """16-bit values (which Pillow also hands out as 32-bit ones) → uint8."""
    return (np.clip(values, 0, 65535).astype(np.uint16) >> 8).astype(np.uint8)


def _over_white(image: Image.Image) -> Image.Image:
    gray = image.mode in ("L", "LA", "La")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    flat = Image.alpha_composite(white, image.convert("RGBA"))
    return flat.convert("L" if gray else "RGB")
