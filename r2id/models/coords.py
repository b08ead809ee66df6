"""Coordinates of points of an image, independent of how many pixels the image has.

Shape letters: B batch · N points · H, W image or grid size.

A point has four coordinates. The absolute ones (ax, ay) run from −½ to ½ between the edges of every
image. The relative ones (rx, ry) do so along the longer side only and have the same unit along the
shorter one, so that a circle stays a circle at any aspect ratio. All four are 0 at the image's
centre; x grows to the right and y downwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import Tensor

from r2id.constants import cached_tensors, constant
from r2id.errors import InputError

Size = tuple[int, int]
Part = tuple[slice, slice]
"""A rectangle of a grid: its rows and its columns."""
WHOLE: Part = (slice(None), slice(None))
"""The whole grid."""
PHASE_DIM = 8
"""Length of cell_phase."""
Window = tuple[int, int, int, int]
"""A rectangle of a picture, (y0, x0, y1, x1): its pixels of y0 ≤ row < y1 and x0 ≤ column < x1."""
_KEPT_CELLS = 1 << 16
"""The most cells of a grid whose coordinates are kept, a megabyte."""
OnProgress = Callable[[int], object]
"""Is called with the number of pixels computed since its last call, such as Progress.advance."""


def check_size(size: Size, name: str = "size", unit: str = "pixels") -> None:
    """Raise InputError for what is no size (H, W); ``name`` and ``unit`` are for its message."""
    if not are_whole(size, 2) or min(size) < 1:
        raise InputError(f"{name} {size!r}: must be (height, width) in {unit}, at least 1 each")


def are_whole(values: object, count: int) -> bool:
    """Tell whether a value is a sequence of ``count`` whole numbers."""
    return (
        isinstance(values, Sequence)
        and len(values) == count
        and all(isinstance(value, Integral) for value in values)
    )


def scale_size(size: Size, scale: tuple[float, float]) -> Size:
    """Multiply a size (H, W) by factors of height and width; at least 1×1."""
    return max(1, round(size[0] * scale[0])), max(1, round(size[1] * scale[1]))


def part_of(size: Size, window: Window | None) -> Part:
    """Return the rows and columns of a window, or all of those of a picture (H, W).

    Raises InputError for what is no window, or is empty or not within the picture.
    """
    if window is None:
        return slice(0, size[0]), slice(0, size[1])
    if are_whole(window, 4):
        y0, x0, y1, x1 = window
        if 0 <= y0 < y1 <= size[0] and 0 <= x0 < x1 <= size[1]:
            return slice(y0, y1), slice(x0, x1)
    raise InputError(
        f"window {window!r}: must be (y0, x0, y1, x1) with 0 ≤ y0 < y1 ≤ {size[0]} and "
        f"0 ≤ x0 < x1 ≤ {size[1]}, in whole pixels of a picture of {size[0]}x{size[1]}"
    )


def centres(count: int, device: torch.device | None = None, part: slice = slice(None)) -> Tensor:
    """Pixel centres along one axis, or along a part of it: (j + ½)/count − ½, float32 [n]."""
    return (
        torch.arange(*part.indices(count), dtype=torch.float32, device=device) + 0.5
    ) / count - 0.5


def grid_coordinates(
    grid: Size, shape: Size | None = None, device: torch.device | None = None, part: Part = WHOLE
) -> Tensor:
    """Coordinates (ax, ay, rx, ry) of the centres of a grid's cells, row by row: float32 [H·W, 4].

    The relative coordinates take the aspect ratio of ``shape`` (height, width), by default the
    grid's own. ``part`` limits the result to a rectangle of cells. Nothing may write to the result,
    which is shared.
    """
    if part == WHOLE and grid[0] * grid[1] <= _KEPT_CELLS:
        return _whole_grid(grid, shape or grid, device)
    return _grid_coordinates(grid, shape or grid, device, part)


@cached_tensors()
def _whole_grid(grid: Size, shape: Size, device: torch.device | None) -> Tensor:
    return _grid_coordinates(grid, shape, device, WHOLE)


def _grid_coordinates(grid: Size, shape: Size, device: torch.device | None, part: Part) -> Tensor:
    height, width = grid
    ay, ax = torch.meshgrid(
        centres(height, device, part[0]), centres(width, device, part[1]), indexing="ij"
    )
    absolute = torch.stack([ax.flatten(), ay.flatten()], dim=-1)
    return torch.cat([absolute, absolute * relative_scale(shape, device)], dim=-1)


@cached_tensors()
def relative_scale(shape: Size, device: torch.device | None = None) -> Tensor:
    """(W/m, H/m) with m = max(H, W): absolute coordinates times this are relative ones."""
    height, width = shape
    scale = torch.tensor([width, height], dtype=torch.float32) / max(height, width)
    return scale.to(device, non_blocking=True)


def displace(coordinates: Tensor, noise: Tensor, grid: Size, shape: Size | None = None) -> Tensor:
    """Move points by half a cell times noise, by the same distance in both systems.

    coordinates [..., N, 4], noise ε [B, N, 2] in (x, y) → [B, N, 4]: ax becomes ax + ε_x/(2W) and
    rx becomes rx + ε_x/(2W)·W/m with m = max(H, W); y likewise.
    """
    height, width = grid
    step = noise * constant((0.5 / width, 0.5 / height), noise.device)
    return coordinates + torch.cat(
        [step, step * relative_scale(shape or grid, noise.device)], dim=-1
    )


def frequencies(powers: Size, device: torch.device) -> Tensor:
    """π·2^p, p from powers[0] to powers[1]: float32 [number of p]."""
    return constant(tuple(math.pi * 2.0**p for p in range(powers[0], powers[1] + 1)), device)


def fourier_dim(powers: Size) -> int:
    """Length of fourier_features: sin and cos of four coordinates at each power."""
    return 8 * (powers[1] - powers[0] + 1)


def fourier_features(coordinates: Tensor, powers: Size) -> Tensor:
    """sin and cos of π·2^p·coordinate, p from powers[0] to powers[1].

    [..., 4] → float32 [..., fourier_dim(powers)], first those of the absolute coordinates, then
    those of the relative ones. Each half is normalised to mean 0 and variance 1, without a learned
    scale. Always float32: bfloat16 has 8 significant bits and cannot tell 1,024 positions apart.
    """
    with torch.autocast(coordinates.device.type, enabled=False):
        angles = coordinates.float().unsqueeze(-1) * frequencies(powers, coordinates.device)
        absolute, relative = (
            F.layer_norm(
                torch.cat([part.sin(), part.cos()], dim=-1).flatten(-2), (fourier_dim(powers) // 2,)
            )
            for part in (angles[..., :2, :], angles[..., 2:, :])
        )
        return torch.cat([absolute, relative], dim=-1)


def cell_phase(coordinates: Tensor, grid: Size) -> Tensor:
    """Where a point lies inside its cell of a grid.

    sin and cos of 2π and 4π times its place in cells: [..., 4] → float32 [..., PHASE_DIM].
    """
    height, width = grid
    cells = coordinates[..., :2] * constant((width, height), coordinates.device)
    # Phase 0 is a cell's edge. The image's centre is an edge in grids of even size and the middle
    # of a cell in those of odd size, so counting from there would make the two disagree.
    cells = cells + constant((width / 2, height / 2), coordinates.device)
    angles = torch.cat([2 * math.pi * cells, 4 * math.pi * cells], dim=-1)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def point_dim(powers: Size) -> int:
    """Length of point_features."""
    return fourier_dim(powers) + PHASE_DIM


def point_features(coordinates: Tensor, grid: Size, powers: Size) -> Tensor:
    """Make fourier_features and cell_phase of points: [..., 4] → float32 [..., point_dim(powers)].

    So they say where a point lies in the image, and where in a cell of the grid.
    """
    features = fourier_features(coordinates, powers), cell_phase(coordinates, grid)
    return torch.cat(features, dim=-1)


def in_cells(coordinates: Tensor, grid: Size) -> Tensor:
    """Absolute coordinates (x, y) in cells, from the image's centre: [..., 4] → [..., 2]."""
    extent = constant((grid[1], grid[0]), coordinates.device)
    return coordinates[..., :2] * extent


def sample_image(image: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolate an image's colours at any points, bicubic.

    image [B, C, H, W], coordinates [B or 1, N, 4] → [B, N, C].

    At a pixel's centre this is the pixel's own colour; outside the image, the border's.
    """
    # grid_sample counts from −1 to 1 between the edges (align_corners=False), and takes a grid
    # [B, height, width, 2]: the points are its only row.
    locations = (2.0 * coordinates[..., :2]).unsqueeze(1)
    colours = F.grid_sample(
        image,
        locations.expand(image.shape[0], -1, -1, -1),
        mode="bicubic",
        padding_mode="border",
        align_corners=False,
    )
    return colours.squeeze(2).transpose(1, 2)
