"""Attention that is local in coordinates: which keys the queries of a tile see.

A latent grid is cut into square tiles, the last of a row or column smaller where the sides do not
divide. The queries that lie in a tile see the keys whose centres lie within the tile's extent plus
a halo, edges included, and nothing else; where no key of an axis is so near, the nearest. What a
query sees thus follows from coordinates alone: not from sizes, and not from which other queries are
asked along with it.

On a regular grid the keys within reach of a tile are a range of each axis, found by bisection.
Every tile takes as many keys of an axis as the fullest does; the surplus repeats the last one and
is masked.

Positions are in cells from the grid's top or left edge: pixel j of n lies at (j + ½)·cells/n.

Shape letters: B batch · t, T tiles of an axis, of the grid · q, Q queries of a tile · k, K keys of
a tile · N queries · M keys · H heads · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from r2id.models.coords import WHOLE, Part, Size


def positions(count: int, cells: int, part: slice = slice(None)) -> np.ndarray:
    """Centres of ``count`` pixels along an axis, or of a part of them, in cells: float64 [n]."""
    # Multiplied first: a centre on the edge of a cell is then exactly on it.
    return (np.arange(*part.indices(count)) + 0.5) * cells / count


def rectangles(size: Size, grid: Size, tile: int, most: int, part: Part = WHOLE) -> Iterator[Part]:
    """Cut a grid (H, W) of queries, or a part of it, into rectangles of about ``most`` points.

    Cuts lie between tiles where whole tiles fit.
    """
    rows, columns = (len(range(*part[i].indices(size[i]))) for i in (0, 1))
    width = min(columns, max(1, math.isqrt(most), most // rows))
    for y in _runs(size[0], grid[0], tile, max(1, most // width), part[0]):
        for x in _runs(size[1], grid[1], tile, width, part[1]):
            yield y, x


def _runs(count: int, cells: int, tile: int, most: int, part: slice) -> Iterator[slice]:
    """Cut one axis into runs of at most ``most``, between tiles where whole ones fit."""
    start, last, _ = part.indices(count)
    edges = np.append(
        np.flatnonzero(np.diff(positions(count, cells, part) // tile)) + 1 + start, last
    )
    while start < last:
        within = edges[(edges > start) & (edges <= start + most)]
        stop = int(within[-1]) if len(within) else start + most
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True)
class _Axis:
    """The tiles of one axis that have queries."""

    queries: np.ndarray
    """Index of each tile's queries, int64 [t, q], and which are no surplus, bool [t, q]."""
    asked: np.ndarray
    keys: np.ndarray
    """Index of each tile's keys among those of ``part``, int64 [t, k], and which are no surplus,
    bool [t, k]."""
    seen: np.ndarray
    middle: np.ndarray
    """Of each tile, in cells from the grid's centre, float64 [t]."""
    part: slice
    """The keys that any of the tiles sees."""


def _axis(queries: np.ndarray, keys: np.ndarray, cells: int, tile: int, halo: float) -> _Axis:
    """Sorted positions of queries [n] and of all keys [m] on an axis of so many cells."""
    numbers, begin, count = np.unique(
        (queries // tile).astype(np.int64), return_index=True, return_counts=True
    )
    low, high = numbers * tile, np.minimum((numbers + 1) * tile, cells)
    start, stop = (
        np.searchsorted(keys, low - halo, "left"),
        np.searchsorted(keys, high + halo, "right"),
    )
    for lonely in np.flatnonzero(start == stop):
        start[lonely] = np.abs(keys - (low[lonely] + high[lonely]) / 2).argmin()
        stop[lonely] = start[lonely] + 1
    first = start.min()
    return _Axis(
        *_ranges(begin, begin + count),
        *_ranges(start - first, stop - first),
        (low + high - cells) / 2,
        slice(int(first), int(stop.max())),
    )


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Make ranges rows of one length, the last index of each repeated as surplus.

    start, stop int64 [t] → indices int64 [t, n], and which of them are no surplus, bool [t, n].
    """
    index = start[:, None] + np.arange((stop - start).max())
    return np.minimum(index, stop[:, None] - 1), index < stop[:, None]


@dataclass(frozen=True)
class Tiles:
    """Tiles of a grid, the same for all samples (B = 1) or each sample's own, and which keys each
    sees.

    In tile order, queries are the T·Q rows that ``queries`` lists, surplus included.
    """

    queries: Tensor
    """Index of each tile's queries among the N asked for, row by row: int64 [B or 1, T, Q]."""
    asked: Tensor
    """Which of them are no surplus: bool [B or 1, T, Q]."""
    keys: Tensor
    """Index of each tile's keys among the M of ``part``, row by row: int64 [B or 1, T, K]."""
    seen: Tensor
    """Which of them are no surplus: bool [B or 1, T, K]."""
    centre: Tensor
    """Of each tile as (x, y), in cells from the grid's centre: float32 [B or 1, T, 2]."""
    slots: Tensor
    """Where in tile order each query is: int64 [N]. Of all tiles alone, not of chosen ones."""
    part: Part
    """The rectangle of keys that any of the tiles sees; no others are needed."""

    @classmethod
    def between(
        cls,
        queries: Size,
        keys: Size,
        grid: Size,
        tile: int,
        halo: float,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles:
        """Build tiles for a query grid (or a part of it) attending to a key grid over one image.

        queries, keys (H, W) points each; tiles of ``tile`` × ``tile`` cells of the latent grid
        (h, w), with a halo in such cells.
        """
        y, x = (
            _axis(
                positions(queries[i], grid[i], part[i]),
                positions(keys[i], grid[i]),
                grid[i],
                tile,
                halo,
            )
            for i in (0, 1)
        )
        rows, columns = (len(positions(queries[i], grid[i], part[i])) for i in (0, 1))
        index, asked = _crossed(y.queries, x.queries, columns), _crossed(y.asked, x.asked)
        slots = np.empty(rows * columns, dtype=np.int64)
        slots[index[asked]] = np.flatnonzero(asked)
        centre = np.stack(
            np.broadcast_arrays(x.middle[None, :], y.middle[:, None]), axis=-1
        ).reshape(-1, 2)

        def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
            return torch.tensor(array, dtype=dtype, device=device)

        return cls(
            tensor(index[None], torch.int64),
            tensor(asked[None], torch.bool),
            tensor(_crossed(y.keys, x.keys, x.part.stop - x.part.start)[None], torch.int64),
            tensor(_crossed(y.seen, x.seen)[None], torch.bool),
            tensor(centre[None], torch.float32),
            tensor(slots, torch.int64),
            (y.part, x.part),
        )

    def chosen(self, index: Tensor) -> Tiles:
        """Some of the tiles for each sample: int64 [B, S] of range(T) → tiles [B, S, …]."""
        queries, asked, keys, seen, centre = (
            part[0][index] for part in (self.queries, self.asked, self.keys, self.seen, self.centre)
        )
        return Tiles(queries, asked, keys, seen, centre, self.slots, self.part)

    def in_order(self, x: Tensor) -> Tensor:
        """Queries [N, …] in tile order: [B or 1, T·Q, …]."""
        return x[self.queries.flatten(1)]

    def restored(self, x: Tensor) -> Tensor:
        """Queries of all tiles from tile order to their own: [B, T·Q, …] → [B, N, …]."""
        return x[:, self.slots]

    def split_queries(self, x: Tensor) -> Tensor:
        """[B, H, T·Q, d] → [B·T, H, Q, d]."""
        return rearrange(x, "b h (t q) d -> (b t) h q d", t=self.queries.shape[1])

    def gather_keys(self, x: Tensor) -> Tensor:
        """[B, H, M, d] → [B·T, H, K, d]: each tile's own."""
        batch, heads, count, dim = x.shape
        offset = count * torch.arange(batch, device=x.device).view(-1, 1, 1)
        rows = x.transpose(1, 2).reshape(batch * count, heads * dim)
        gathered = F.embedding((self.keys + offset).flatten(), rows)
        return gathered.view(-1, self.keys.shape[2], heads, dim).transpose(1, 2)

    def split_places(self, at: Tensor, context_at: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Measure places from the centre of their tile instead of the grid's, in cells.

        Queries [B or 1, T·Q, 2] and keys [B or 1, M, 2] → [B·T, Q, 2] and [B·T, K, 2]. Near zero,
        bfloat16 keeps places apart in a grid of any size.
        """
        own = rearrange(
            at, "b (t q) c -> b t q c", t=self.queries.shape[1]
        ) - self.centre.unsqueeze(2)
        sample = torch.arange(len(context_at), device=at.device).view(-1, 1, 1)
        theirs = context_at[sample, self.keys] - self.centre.unsqueeze(2)
        return own.expand(batch, -1, -1, -1).flatten(0, 1), theirs.expand(
            batch, -1, -1, -1
        ).flatten(0, 1)

    def mask(self, batch: int) -> Tensor:
        """Which keys a tile's queries see: bool [B·T, 1, 1, K]."""
        return rearrange(self.seen.expand(batch, -1, -1), "b t k -> (b t) 1 1 k")

    def joined(self, x: Tensor) -> Tensor:
        """The inverse of split_queries."""
        return rearrange(x, "(b t) h q d -> b h (t q) d", t=self.queries.shape[1])


def _crossed(y: np.ndarray, x: np.ndarray, width: int = 0) -> np.ndarray:
    """Combine what is known of rows and of columns: [t_y, n_y] and [t_x, n_x] → [T, n].

    Of masks, what holds on both axes; with ``width``, of indices, those in a grid so wide.
    """
    y, x = y[:, None, :, None], x[None, :, None, :]
    both = y * width + x if width else y & x
    return both.reshape(both.shape[0] * both.shape[1], -1)
