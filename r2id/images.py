"""Images as tensors and as files: bytes and [−1, 1] floats, resizing, PSNR, PNG.

Shape letters: B batch · C colours · H, W image.
"""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from r2id.errors import InputError
from r2id.files import write_atomic

_SMALLEST_MSE = 1e-10
"""Lower bound of errors, so that the PSNR is finite: at most 106 dB, which no eye can tell from
equal."""


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 of any shape to float32 in [−1, 1], on the same device."""
    return images.float().div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert float images in [−1, 1], of any shape, to uint8, rounded and clipped."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_bytes(images: Tensor) -> Tensor:
    """Convert float [..., C, H, W] in [−1, 1] to uint8 [..., H, W, C], the layout of Pillow."""
    return to_uint8(images).movedim(-3, -1)


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images [B, C, H, W] to another height and width, in float32.

    Bicubic, with a filter that is wider for smaller sizes, so that nothing aliases. Beside sharp
    edges the result may lie outside the range of the input.
    """
    if tuple(images.shape[2:]) == tuple(size):
        return images.float()
    if images.requires_grad and torch.are_deterministic_algorithms_enabled():
        return _resize_by_products(images.float(), size)
    return _bicubic(images.float(), size)


def _bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    if size[1] == 1 and images.device.type == "cpu":
        # PyTorch 2.13 repeats the first row on a CPU when the result is one pixel wide.
        images = images.transpose(2, 3).contiguous()
        return _bicubic_by_pytorch(images, (1, size[0])).transpose(2, 3)
    return _bicubic_by_pytorch(images, size)


def _bicubic_by_pytorch(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _resize_by_products(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by a matrix for each axis: on CUDA, the gradient of interpolation has random bits."""
    height, width = images.shape[2:]
    down, across = (torch.eye(side, device=images.device)[None, None] for side in (height, width))
    with torch.autocast(images.device.type, enabled=False):
        rows = _bicubic(down, (size[0], height)) @ images
        return rows @ _bicubic(across, (size[1], width)).mT


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors on [−1, 1], where the peak is 2.

    Any shape → the same shape; at most 106 dB.
    """
    return 10 * torch.log10(4 / error.clamp(min=_SMALLEST_MSE))


def tile(images: Tensor, columns: int, gap: int = 2) -> Tensor:
    """Lay images [B, C, H, W] out in rows with black gaps: one image [C, H', W']."""
    short = -len(images) % columns
    padded = F.pad(images, (0, gap, 0, gap), value=-1.0)
    padded = F.pad(padded, (0, 0, 0, 0, 0, 0, 0, short), value=-1.0)
    return rearrange(padded, "(r k) c h w -> c (r h) (k w)", k=columns)


def encode_png(image: Tensor, optimize: bool = False) -> bytes:
    """Encode one image [C, H, W] in [−1, 1] (C 1 or 3) as a PNG file.

    ``optimize`` makes the file smaller, which takes longer.
    """
    buffer = io.BytesIO()
    # Pillow expects grey pictures as [H, W], without a channel dimension.
    pixels = to_bytes(image).squeeze(-1).cpu().numpy()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=optimize)
    return buffer.getvalue()


def save_png(image: Tensor, path: Path) -> Path:
    """Write one image [C, H, W] in [−1, 1] (C 1 or 3) as a PNG file, completely or not at all.

    Returns the path. Raises WorkError when it cannot be written.
    """
    write_atomic(path, encode_png(image))
    return path


def read_image(path: Path, channels: int, background: int = 255) -> Tensor:
    """Read one picture file, upright, as float32 [C, H, W] in [−1, 1].

    Transparent pixels are blended with a grey, from 0 (black) to 255 (white). Raises InputError
    when there is no such file, or when it cannot be read as an image.
    """
    from r2id.data.records import decode

    try:
        array = decode(path.read_bytes(), channels, background)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable image: {error}") from None
    return to_float(torch.from_numpy(array).movedim(-1, 0))
