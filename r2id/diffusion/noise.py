"""One seed, one picture: noise is a field over the image, which every grid averages in its cells.

Shape letters: B samples · L channels · h, w grid · R side of the field's finest level.

White noise on the unit square is refined level by level, as in a Haar wavelet basis: a cell of side
2⁻ˡ holds a standard normal value, which with three more draws becomes its four quarters'. A grid's
cell sums the finest cells within it, so its values are independent standard normals, and a finer
grid's, averaged over a coarser cell and rescaled, are the coarser grid's: exactly where the grids
nest, and within the rounding of edges to the finest cells elsewhere.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from r2id import rng

# Cells per side of the finest level, at least. Grids of up to 32 cells share one field this way.
_FINEST_SIDE = 128
# Finest cells per side of a grid's cell, at least: edges are rounded to a fraction of a cell.
_FINEST_PER_CELL = 4


def noise_field(rng_keys: Tensor, channels: int, grid: tuple[int, int]) -> Tensor:
    """Standard normal noise of a grid: rng_keys int64 [B], one per sample → float32 [B, L, h, w].

    A sample's noise depends on its key alone, not on the batch or the number of devices. Grids of
    other sizes see the same field.
    """
    # 2^levels, the finest side, is the smallest power of 2 that is not below either number.
    levels = (max(_FINEST_SIDE, _FINEST_PER_CELL * max(grid)) - 1).bit_length()
    field = rng.normal(rng.fold(rng_keys, 0), channels, 1, 1)
    for level in range(levels):
        field = _refine(field, rng.fold(rng_keys, level + 1))
    return _cells(_cells(field, grid[0], dim=2), grid[1], dim=3)


def _refine(field: Tensor, rng_keys: Tensor) -> Tensor:
    """Invert an orthonormal Haar transform with random details: [B, L, R, R] → [B, L, 2R, 2R]."""
    # A quarter is (value ± details)/2, a sum of four independent normals: its variance is 1 again.
    # The signs are the rows of an orthogonal matrix, so the quarters are independent, and their sum
    # is twice the value.
    channels, side = field.shape[1:3]
    details = rng.normal(rng_keys, channels, side, side, 3)
    across, down, both = details.unbind(-1)
    quarters = torch.stack(
        [
            field + across + down + both,
            field - across + down - both,
            field + across - down - both,
            field - across - down + both,
        ]
    )
    return rearrange(quarters, "(i j) b l h w -> b l (h i) (w j)", i=2) / 2


def _cells(field: Tensor, count: int, dim: int) -> Tensor:
    """Sum runs of the finest cells into ``count`` cells along one axis, rescaled to variance 1."""
    side = field.shape[dim]
    # In float64 on the CPU: edges must be the same on every device.
    edges = (
        torch.round(torch.arange(count + 1, dtype=torch.float64) * side / count)
        .long()
        .to(field.device)
    )
    owner = torch.bucketize(torch.arange(side, device=field.device), edges[1:], right=True)
    shape = [*field.shape]
    shape[dim] = count
    summed = torch.zeros(shape, dtype=field.dtype, device=field.device).index_add_(
        dim, owner, field
    )
    # A sum of n independent standard normals has variance n.
    lengths = (edges[1:] - edges[:-1]).to(field.dtype)
    return summed / lengths.sqrt().view([-1 if axis == dim else 1 for axis in range(field.dim())])
