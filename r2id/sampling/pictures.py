"""Pictures of Pillow, of files and of arrays as tensors, and back.

Arrays of NumPy and tensors are told apart by their numbers alone: those of uint8 are as Pillow has
them, [H, W] or [H, W, C] with 1, 3 or 4 colours from 0 to 255, and floats are as the models have
them, [C, H, W] from −1 to 1. A mask may also be bool [H, W], true where pixels are drawn.

Shape letters: B pictures · C colours · H, W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r2id.data.pixels import decoding, flatten, load_upright
from r2id.data.records import to_array
from r2id.errors import InputError
from r2id.images import read_image, to_bytes, to_float
from r2id.models.coords import check_size

Picture = Image.Image | PathLike[str] | str | np.ndarray | Tensor
"""A picture of Pillow, the path of an image file, or an array or tensor."""


def as_pictures(given: Sequence[Any]) -> list[Picture]:
    """Return pictures one by one, also those of one list, or of one array [B, …]."""
    first = given[0] if len(given) == 1 else None
    batch = isinstance(first, np.ndarray | Tensor) and first.ndim == 4
    return list(given[0] if batch or isinstance(first, list | tuple) else given)


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
    if isinstance(picture, np.ndarray | Tensor):
        values = _values(picture, name)
        if values.is_floating_point() and name == "picture":
            return _check_floats(values, channels)
        picture = _from_bytes(values, name)
    if not isinstance(picture, Image.Image):
        raise InputError(
            f"{name} of type {type(picture).__name__}: must be one of Pillow, a file's path, or an "
            "array or tensor"
        )
    check_size((picture.height, picture.width), f"{name} of size")
    try:
        with decoding():
            array = to_array(flatten(load_upright(picture), channels, background))
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    return to_float(torch.from_numpy(array).movedim(-1, 0))


def _values(given: np.ndarray | Tensor, name: str) -> Tensor:
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        # A copy: PyTorch takes no array that is flipped, and warns of one that is read-only.
        return torch.from_numpy(np.array(given, order="C"))
    except (TypeError, ValueError):
        raise InputError(f"{name} of {given.dtype}: must be numbers that PyTorch has") from None


def _check_floats(values: Tensor, channels: int) -> Tensor:
    """Return floats of a picture as float32, if they are [C, H, W] in [−1, 1]."""
    if values.dim() != 3 or values.shape[0] != channels or not values.numel():
        raise InputError(
            f"picture of {_kind(values)}: floats must be [{channels}, H, W], from −1 to 1"
        )
    # Written so that it is raised for NaN, too.
    if not values.abs().max() <= 1:
        low, high = values.min(), values.max()
        raise InputError(f"picture of floats from {low:g} to {high:g}: must be from −1 to 1")
    return values.to(torch.float32, copy=True)


def _from_bytes(values: Tensor, name: str) -> Image.Image:
    """Make a picture of Pillow of uint8 [H, W] or [H, W, C], or of a mask of bool [H, W]."""
    if name == "mask" and values.dtype == torch.bool and values.dim() == 2:
        values = values.to(torch.uint8) * 255
    coloured = values.dim() == 3 and values.shape[2] in (1, 3, 4)
    if values.dtype != torch.uint8 or not (values.dim() == 2 or coloured):
        also = "or bool [H, W]" if name == "mask" else "or floats [C, H, W] from −1 to 1"
        raise InputError(
            f"{name} of {_kind(values)}: must be uint8 [H, W] or [H, W, C] with C 1, 3 or 4, {also}"
        )
    check_size((values.shape[0], values.shape[1]), f"{name} of size")
    return Image.fromarray((values.squeeze(2) if values.dim() == 3 else values).numpy())


def _kind(values: Tensor) -> str:
    return f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
