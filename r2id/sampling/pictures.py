"""Pictures of Pillow, and of files, as tensors, and back.

Shape letters: C colours · H, W picture.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from r2id.data.pixels import decoding, flatten, load_upright
from r2id.data.records import to_array
from r2id.errors import InputError
from r2id.images import read_image, to_bytes, to_float
from r2id.models.coords import check_size

Picture = Image.Image | PathLike[str] | str
"""A picture of Pillow, or the path of an image file."""


def read_picture(picture: Picture, channels: int) -> Tensor:
    """Read a picture, upright, as float32 [C, H, W] in [−1, 1].

    Raises InputError for what is no picture, or cannot be read.
    """
    return _read(picture, channels, "picture", 255)


def read_mask(mask: Picture) -> Tensor:
    """Read a picture as a mask, bool [1, H, W]: true where it is white, 128 or more of 255.

    What is transparent counts as black. Raises InputError like read_picture.
    """
    return _read(mask, 1, "mask", 0) >= 0


def to_picture(image: Tensor) -> Image.Image:
    """Convert an image [C, H, W] in [−1, 1] to Pillow's, of mode L or RGB."""
    return Image.fromarray(to_bytes(image).squeeze(-1).cpu().numpy())


def _read(picture: Picture, channels: int, name: str, background: int) -> Tensor:
    """Read a picture, which errors call ``name``; see ``flatten`` for its background."""
    if isinstance(picture, str | PathLike):
        return read_image(Path(picture), channels, background)
    if not isinstance(picture, Image.Image):
        raise InputError(
            f"{name} of type {type(picture).__name__}: must be one of Pillow, or a file's path"
        )
    check_size((picture.height, picture.width), f"{name} of size")
    try:
        with decoding():
            array = to_array(flatten(load_upright(picture), channels, background))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return to_float(torch.from_numpy(array).movedim(-1, 0))
