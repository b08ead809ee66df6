"""One seed, one picture: noise is a field over the image, which every grid averages in its cells.

Shape letters: B samples · L channels · h, w grid · R positions of the field along an axis · I, J
basis functions down and across.

The field is white noise on R×R positions, given by standard normal coefficients of products of two
Haar functions, one down and one across. A coefficient depends on the sample and on the numbers of
its two functions alone; more positions only add functions of finer detail. A grid's cell sums the
positions within it, so its values are independent standard normals, and a finer grid's, averaged
over a coarser cell and rescaled, are the coarser grid's: exactly where the grids nest, and within
the rounding of edges to positions elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id import rng
from r2id.constants import cached_tensors

# Positions along an axis, at least. Grids of up to 64 cells share one field this way.
_POSITIONS = 256
# Positions of a cell along an axis, at least: edges are rounded to a fraction of a cell.
_POSITIONS_PER_CELL = 4


def noise_field(
    rng_keys: Tensor, channels: int, grid: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Standard normal noise of a grid: rng_keys int64 [B], one per sample → float32 [B, L, h, w].

    A sample's noise depends on its key alone, not on the batch or the number of devices, and is the
    same on a GPU and a CPU within float32's rounding. Grids of other sizes see the same field. It
    is computed on ``device``, by default that of the keys.
    """
    device = device or rng_keys.device
    rows, down, columns, across = _haar_matrices(grid, device)
    # The few keys of rows are made where those of samples are, as a rule on the CPU.
    keys = rng.fold(rng_keys.unsqueeze(1), rows.to(rng_keys.device))
    keys = rng.fold(keys.to(device, non_blocking=True).unsqueeze(2), columns)
    coefficients = rng.normal(keys, channels).permute(0, 3, 1, 2)
    # As matrices of one sample and channel each, whose products round alike in any batch.
    batch = coefficients.shape[:2]
    noise = (
        down.expand(*batch, -1, -1) @ coefficients.to(down.dtype) @ across.T.expand(*batch, -1, -1)
    )
    return noise.float()


@cached_tensors(16)
def _haar_matrices(
    grid: tuple[int, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return numbers and sums of the Haar functions down, then across: [I], [h, I], [J], [w, J].

    All are on the device but the first, which is on the CPU. The sums are float32, but on a GPU
    float64: its products of float32 are those of TF32 where dist.allow_tf32 has been called, which
    would make another noise of a seed.
    """
    positions = max(_POSITIONS, _POSITIONS_PER_CELL * max(grid))
    levels = (positions - 1).bit_length()  # R = 2^levels, the next power of 2
    (rows, down), (columns, across) = (_haar_sums(count, levels) for count in grid)
    columns = columns.to(device, non_blocking=True)
    if device.type == "cuda":
        down, across = down.double(), across.double()
    down, across = (sums.to(device, non_blocking=True) for sums in (down, across))
    return rows, down, columns, across


def _haar_sums(cells: int, levels: int) -> tuple[Tensor, Tensor]:
    """Sum each Haar function over each cell of an axis, rescaled so that sums have variance 1.

    Returns the indices of the functions whose sum is not 0 in at least one cell, int64 [I], and the
    sums, float32 [cells, I]. Most functions lie within one cell, where they sum to 0.

    Function 0 is constant; function 2^l + k is positive on the first half of the k-th of 2^l equal
    parts of the axis, negative on its second half, and 0 elsewhere. All have a squared sum of 1.
    """
    # On the CPU, with whole numbers wherever a sum must be exactly 0.
    side = 1 << levels
    edges = torch.round(torch.arange(cells + 1, dtype=torch.float64) * side / cells).long()
    first, last = edges[:-1, None], edges[1:, None]
    number = torch.arange(1, side)
    level = torch.cat([torch.full((1 << power,), power) for power in range(levels)])
    half = side >> (level + 1)  # positions of half a part
    begin = (number - (1 << level)) * 2 * half

    def overlap(start: Tensor) -> Tensor:
        return (torch.minimum(last, start + half) - torch.maximum(first, start)).clamp(min=0)

    signed = overlap(begin) - overlap(begin + half)
    used = (signed != 0).any(0)
    lengths = (last - first).float()
    scales = (2 * half[used]).float().sqrt()
    sums = torch.cat([lengths / side**0.5, signed[:, used] / scales], dim=1)
    numbers = torch.cat([torch.zeros(1, dtype=torch.int64), number[used]])
    # A sum of n independent standard normals has variance n.
    return numbers, sums / lengths.sqrt()
