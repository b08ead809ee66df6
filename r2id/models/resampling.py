"""Bicubic resizing of any part of a picture, equal to that of the whole picture.

``resample`` makes the same values as r2id.images.resize, but only those of a rectangle, so that
large pictures can be resized piece by piece, and differentiably.

Shape letters: B batch · C colours · H, W picture.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from r2id.constants import cached_tensors
from r2id.images import resize
from r2id.models.coords import WHOLE, Part, Size


def resample(images: Tensor, size: Size, part: Part = WHOLE) -> Tensor:
    """Resize images [B, C, H, W] to a height and width, and return a part of that, in float32.

    Bicubic, with a filter that is wider for smaller sizes, so that nothing aliases.
    """
    if tuple(images.shape[2:]) == tuple(size):
        return images[:, :, part[0], part[1]].float()
    if _is_whole(size, part):
        return resize(images, size)
    sides = zip(images.shape[2:], size, part, strict=True)
    rows, columns = (taps(*side)[0] for side in sides)
    seen = images[:, :, rows, columns]
    return resample_seen(
        seen, (images.shape[2], images.shape[3]), size, part, (rows.start, columns.start)
    )


def resample_seen(seen: Tensor, whole: Size, size: Size, part: Part, first: Size) -> Tensor:
    """Do what ``resample`` does, given only the pixels that the part needs, and more or not.

    ``seen`` [B, C, …] are those from row and column ``first`` on, of pictures of size ``whole``.
    """
    rows, columns = (
        axis_matrix(count, out, side.indices(out), start, known, seen.device)
        for count, out, side, start, known in zip(
            whole, size, part, first, seen.shape[2:], strict=True
        )
    )
    # Matrix products over the few pixels that a piece sees: fast on every device.
    return along_axes(rows, seen, columns)


def along_axes(rows: Tensor, images: Tensor, columns: Tensor) -> Tensor:
    """Multiply the axes of images [B, C, H, W] by [H', H] and [W', W], in float32.

    Under autocast too, whose bfloat16 would show in pictures. (A GPU may multiply in TF32; see
    dist.allow_tf32.)
    """
    with torch.autocast(images.device.type, enabled=False):
        return rows @ images.float() @ columns.T


@cached_tensors(32)
def axis_matrix(
    count: int, out: int, part: tuple[int, int, int], start: int, known: int, device: torch.device
) -> Tensor:
    """Make the matrix that resizes one axis, given ``known`` of its pixels from ``start`` on.

    Pixels that are not known count as 0.
    """
    needed, weights = taps(count, out, slice(*part))
    matrix = np.zeros((len(weights), known))
    low = max(needed.start, start)
    high = max(low, min(needed.stop, start + known))
    matrix[:, low - start : high - start] = weights[:, low - needed.start : high - needed.start]
    return torch.from_numpy(matrix).float().to(device, non_blocking=True)


def taps(count: int, out: int, part: slice = slice(None)) -> tuple[slice, np.ndarray]:
    """Weights that resize one axis of ``count`` pixels to ``out``, for a part of the output.

    Returns the range of input pixels that the part sees, and the weights [outputs, inputs seen].

    The kernel is Keys' cubic with a = −½ (Keys 1981), widened by count/out where that is over 1;
    beyond the borders weights are left out and the others scaled up, as in PyTorch and Pillow.
    """
    if count == out:
        start, stop, _ = part.indices(count)
        return slice(start, stop), np.eye(stop - start)
    scale = count / out
    wide = max(1.0, scale)
    centre = (np.arange(*part.indices(out)) + 0.5) * scale
    first = np.maximum(0, (centre - 2 * wide + 0.5).astype(int))
    stop = np.minimum(count, (centre + 2 * wide + 0.5).astype(int))
    low, high = int(first.min()), int(stop.max())
    pixels = np.arange(low, high)
    weights = _keys((pixels + 0.5 - centre[:, None]) / wide)
    weights *= (pixels >= first[:, None]) & (pixels < stop[:, None])
    return slice(low, high), weights / weights.sum(axis=1, keepdims=True)


def _keys(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = −½."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _is_whole(size: Size, part: Part) -> bool:
    return all(side.indices(count) == (0, count, 1) for side, count in zip(part, size, strict=True))
