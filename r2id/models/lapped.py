"""The lapped transform of RIAE's lattice, by which the pictures of neighbouring cells join.

Where each cell is coded by itself, the errors of two neighbours have nothing to do with each other,
and the border between them shows as a line: most of all in what a diffusion model draws, whose
errors are large. So the points on both sides of each border are mixed before cells are coded, and
what is decoded is unmixed. The picture of one latent then reaches half a cell into the cells
around, and fades out there.

The mixing takes the points on both sides of a border apart into the sums of mirrored pairs, which
stay, and their differences, of which the smoothest is enlarged (Tran, Liang & Tu 2003, "Lapped
transform via time-domain pre- and post-filtering"). A principal component analysis of cells that
are mixed so has less error than one of cells by themselves with as many latents.

Shape letters: B batch · C colours · s points per side of a cell · h, w cells.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r2id.constants import cached_tensors

_ENLARGED = 1.5
"""How much the smoothest difference across a border is enlarged. 1 makes the mixing orthogonal."""


def lap(points: Tensor, cell: int) -> Tensor:
    """Mix the points across the borders of cells: float32 [B, C, h·s, w·s], the same shape.

    The outer borders stay as they are, as if the picture were mirrored there.
    """
    return _across_borders(points, cell, inverse=False)


def unlap(points: Tensor, cell: int) -> Tensor:
    """Invert lap."""
    return _across_borders(points, cell, inverse=True)


def _across_borders(points: Tensor, cell: int, inverse: bool) -> Tensor:
    if cell == 1:
        return points
    matrix = _mixing(cell, inverse, points.device)
    with torch.autocast(points.device.type, enabled=False):
        for axis in (2, 3):
            borders = points.shape[axis] // cell - 1
            if not borders:
                continue
            # From the middle of the first cell to the middle of the last, a border in each part.
            first, count = cell - cell // 2, borders * cell
            last = points.shape[axis] - first - count
            before, middle, after = points.split([first, count, last], dim=axis)
            parts = middle.unflatten(axis, (borders, cell))
            mixed = matrix @ parts if axis == 2 else parts @ matrix.T
            points = torch.cat([before, mixed.flatten(axis, axis + 1), after], dim=axis)
    return points


@cached_tensors()
def _mixing(cell: int, inverse: bool, device: torch.device) -> Tensor:
    """Make the matrix [s, s] that mixes the points from the middle of a cell to the next one's."""
    side = cell // 2
    same, flip = torch.eye(side, dtype=torch.float64), torch.eye(side, dtype=torch.float64).flip(0)
    pairs = torch.cat([torch.cat([same, flip], 1), torch.cat([flip, -same], 1)]) / math.sqrt(2)
    number = torch.arange(side, dtype=torch.float64)
    angles = (math.pi / side) * (number + 0.5)
    # The cosine transforms II and IV, whose rows are orthogonal.
    second = torch.cos(number[:, None] * angles) * math.sqrt(2 / side)
    second[0] /= math.sqrt(2)
    fourth = torch.cos((number[:, None] + 0.5) * angles) * math.sqrt(2 / side)
    second[0] *= _ENLARGED
    differences = flip @ second.T @ fourth @ flip
    matrix = torch.eye(cell, dtype=torch.float64)  # an odd cell's middle point stays
    matrix[: 2 * side, : 2 * side] = pairs @ torch.block_diag(same, differences) @ pairs
    if inverse:
        matrix = torch.linalg.inv(matrix)
    return matrix.float().to(device, non_blocking=True)
