"""Images between tensors and files: [−1, 1] float tensors, PNG grids, reading one picture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from r2id.errors import InputError


def to_bytes(images: Tensor) -> Tensor:
    """float [..., C, H, W] in [−1, 1] → uint8 [..., H, W, C], rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(-3, -1)


def save_png(image: Tensor, path: Path) -> Path:
    """Write one image [C, H, W] in [−1, 1] (C 1 or 3) as PNG: complete or not at all."""
    array = to_bytes(image).squeeze(-1).cpu().numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "wb") as file:
        Image.fromarray(array).save(file, format="PNG")
    Path(name).chmod(0o644)
    Path(name).replace(path)
    return path


def tile(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """A grid of images [B, C, H, W], row by row, between gaps of the darkest value: [C, H', W']."""
    short = -len(images) % columns
    padded = F.pad(images, (0, gap, 0, gap), value=-1.0)
    padded = F.pad(padded, (0, 0, 0, 0, 0, 0, 0, short), value=-1.0)
    return rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)


def read_image(path: Path, channels: int) -> Tensor:
    """One picture file, upright, as float32 [C, H, W] in [−1, 1]. InputError when it is none."""
    from r2id.data.records import decode

    try:
        array = decode(path.read_bytes(), channels)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable image: {error}") from None
    return torch.from_numpy(array).movedim(-1, 0).float() / 127.5 - 1
