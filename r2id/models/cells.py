"""The lattice of points in latent cells: how pictures lie on it, and pieces of it.

Each cell of a latent grid has s×s points. A picture of *native size* (H, W) covers the first H rows
and W columns of them; the last cells may exceed it.

Shape letters: B batch · C colours · H, W picture · s points per side of a cell · h, w latent grid
· N values per point.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import Tensor

from r2id.config.models import lattice_grid
from r2id.constants import cached_tensors
from r2id.models.coords import WHOLE, Part, Size
from r2id.models.resampling import resample

_PIECE = 1 << 19
"""Points or pixels that are computed at once outside training, without their surroundings."""


def native_size(grid: Size, size: Size, cell: int) -> Size:
    """Choose how many lattice points (rows, columns) a picture of a size (H, W) covers on a grid.

    The size itself where the grid is its own; else the largest picture of that aspect ratio that
    needs all cells of the grid; else, where the ratios differ by more than a cell, all points.
    """
    if lattice_grid(size, cell) == grid:
        return size
    points = grid[0] * cell, grid[1] * cell
    scale = max(size[0] / points[0], size[1] / points[1])
    native = max(1, round(size[0] / scale)), max(1, round(size[1] / scale))
    return native if lattice_grid(native, cell) == grid else points


def on_lattice(images: Tensor, native: Size, cell: int, part: Part = WHOLE) -> Tensor:
    """Read images [B, C, H, W] at the lattice points of a part of the cells.

    Resized to the native size where they have another, and mirrored at the lower and right border
    up to the end of the last cells. A diffusion model draws whole cells: what lies beyond a border
    may become visible at another size, and should look like a picture too.
    """
    spans: list[slice] = []
    mirrored: dict[int, tuple[int, ...]] = {}
    for dim, (side, cells, own) in enumerate(
        zip(part, lattice_grid(native, cell), native, strict=True), start=2
    ):
        start, stop, _ = side.indices(cells)
        span = slice(start * cell, stop * cell)
        if span.stop > own:
            wanted = [_mirror(place, own) for place in range(span.start, span.stop)]
            span = slice(min(wanted), own)
            mirrored[dim] = tuple(place - span.start for place in wanted)
        spans.append(span)
    points = resample(images, native, (spans[0], spans[1]))
    for dim, places in mirrored.items():
        points = points.index_select(dim, _indices(places, points.device))
    return points


def _mirror(place: int, length: int) -> int:
    """Return the place in range(length) that a place beyond its end mirrors."""
    place %= max(1, 2 * (length - 1))
    return min(place, 2 * (length - 1) - place)


@cached_tensors()
def _indices(places: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(places).to(device, non_blocking=True)


def to_cells(points: Tensor, cell: int) -> Tensor:
    """Gather the points of each cell: [B, N, h·s, w·s] → [B, h, w, N·s²]."""
    return rearrange(points, "b n (h i) (w j) -> b h w (n i j)", i=cell, j=cell)


def to_points(values: Tensor, cell: int) -> Tensor:
    """Lay out cells' values: [B, h, w, N·s²] → [B, N, h·s, w·s]."""
    return rearrange(values, "b h w (n i j) -> b n (h i) (w j)", i=cell, j=cell)


def pieces(
    size: Size, part: Part, scales: tuple[float, float], batch: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Cut pictures into pieces of as many points as are computed at once: images, rows, columns.

    Small pictures are taken several at a time, and large ones in squares of points. ``part`` is
    that of a grid (H, W) with ``scales`` points per element along its height and its width.
    """
    height, width = (max(1, int(_PIECE**0.5 / scale)) for scale in scales)
    rows, columns = (range(*span.indices(count)) for span, count in zip(part, size, strict=True))
    at_once = max(1, int(_PIECE / (len(rows) * scales[0] * len(columns) * scales[1])))
    for image in range(0, batch, at_once):
        for y in range(rows.start, rows.stop, height):
            for x in range(columns.start, columns.stop, width):
                yield (
                    slice(image, image + at_once),
                    slice(y, min(y + height, rows.stop)),
                    slice(x, min(x + width, columns.stop)),
                )
