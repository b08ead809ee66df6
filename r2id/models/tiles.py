"""Attention that is local in coordinates: which keys the queries of a tile see.

A latent grid is cut into square tiles; the last of a row or column is smaller where the sides do
not divide. The queries in a tile see the keys whose centres lie within the tile or a halo around
it, edges included. Where an axis has no key so near, they see its nearest one. What a query sees
follows from coordinates alone. It depends neither on sizes nor on which other queries are computed
along with it.

On a regular grid the keys that a tile sees are a range of each axis, found by bisection. All tiles
have as many slots for queries and for keys as the fullest tile needs, so that they form tensors.
The slots left over in the other tiles, called padding, repeat the last index and are masked.

Positions are in cells from the grid's top or left edge: pixel j of n lies at (j + ½)·cells/n.

Shape letters: B batch · t, T tiles of an axis, of the grid · q, Q queries of a tile on an axis, in
all · k, K keys of a tile on an axis, in all · N queries · M keys · H heads · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from r2id.constants import cached_tensors
from r2id.models.coords import WHOLE, Part, Size
from r2id.models.rows import InverseIndex, gather_rows, permute_rows


def positions(count: int, cells: int, part: slice = slice(None)) -> np.ndarray:
    """Centres of ``count`` pixels along an axis, or of a part of them, in cells: float64 [n]."""
    # Multiplied before it is divided: a centre on the edge of a cell is then exactly on it.
    return (np.arange(*part.indices(count)) + 0.5) * cells / count


def rectangles(size: Size, grid: Size, tile: int, most: int, part: Part = WHOLE) -> Iterator[Part]:
    """Cut a grid (H, W) of queries, or a part of it, into rectangles of about ``most`` points.

    They are made of whole tiles where at least one fits into ``most`` points, because the keys of a
    tile that is cut have to be gathered for each of its parts.
    """
    rows, columns = (len(range(*part[i].indices(size[i]))) for i in (0, 1))
    width = min(columns, max(1, math.isqrt(most), most // rows))
    for y in _runs(size[0], grid[0], tile, max(1, most // width), part[0]):
        for x in _runs(size[1], grid[1], tile, width, part[1]):
            yield y, x


def _runs(count: int, cells: int, tile: int, most: int, part: slice) -> Iterator[slice]:
    """Cut one axis into runs of at most ``most`` points, between tiles where whole ones fit."""
    start, last, _ = part.indices(count)
    # Where the tile changes from one point to the next; the end of the part is an edge too.
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
    """Index of each tile's queries, int64 [t, q]."""
    query_mask: np.ndarray
    """False for padding, bool [t, q]."""
    keys: np.ndarray
    """Index of each tile's keys among those of ``part``, int64 [t, k]."""
    key_mask: np.ndarray
    """False for padding, bool [t, k]."""
    middle: np.ndarray
    """Middle of each tile, in cells from the grid's centre, float64 [t]."""
    part: slice
    """The keys that at least one tile sees."""


def _axis(queries: np.ndarray, keys: np.ndarray, cells: int, tile: int, halo: float) -> _Axis:
    """Build the tiles of an axis from the sorted positions of queries [n] and of all keys [m]."""
    numbers, begin, count = np.unique(
        (queries // tile).astype(np.int64), return_index=True, return_counts=True
    )
    low, high = numbers * tile, np.minimum((numbers + 1) * tile, cells)
    start, stop = (
        np.searchsorted(keys, low - halo, "left"),
        np.searchsorted(keys, high + halo, "right"),
    )
    for lonely in np.flatnonzero(start == stop):  # no key within reach: the nearest one
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
    """Write ranges as rows of one length, padded with the last index of each.

    start, stop int64 [t] → indices int64 [t, n] and their mask bool [t, n], False for padding.
    """
    index = start[:, None] + np.arange((stop - start).max())
    return np.minimum(index, stop[:, None] - 1), index < stop[:, None]


@dataclass(frozen=True)
class Tiles:
    """Tiles of a grid, and the queries and keys of each.

    They are the same for all samples (B = 1), or each sample has its own. "In tile order" means the
    T·Q queries of all tiles one after another, padding included.
    """

    queries: Tensor
    """Index of each tile's queries among all N, row by row: int64 [B or 1, T, Q]."""
    query_mask: Tensor
    """False for padding: bool [B or 1, T, Q]."""
    keys: Tensor
    """Index of each tile's keys among the M of ``part``, row by row: int64 [B or 1, T, K]."""
    key_mask: Tensor
    """False for padding: bool [B or 1, T, K]."""
    takers: InverseIndex
    """Which of the T·K keys of all tiles, padding left out, each of the M keys is."""
    padded: bool
    """Whether any tile has padding among its keys."""
    centre: Tensor
    """Centre (x, y) of each tile, in cells from the grid's centre: float32 [B or 1, T, 2]."""
    slots: Tensor
    """Where each query is in tile order: int64 [N]. Holds for all tiles, not for chosen ones."""
    part: Part
    """The rectangle of keys that at least one tile sees; no others are needed."""

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

        ``queries`` and ``keys`` are the (H, W) of the two grids. Tiles are of ``tile`` × ``tile``
        cells of the latent grid ``grid`` (h, w); ``halo`` is in cells too. They are shared: nothing
        may write to them.
        """
        spans = part[0].indices(queries[0]), part[1].indices(queries[1])
        return _tiles_between(queries, keys, grid, tile, halo, spans, device)

    def choose(self, index: Tensor) -> Tiles:
        """Take some of the tiles for each sample: index int64 [B, S] → tiles [B, S, …]."""
        queries, query_mask, keys, key_mask, centre = (
            part[0][index]
            for part in (self.queries, self.query_mask, self.keys, self.key_mask, self.centre)
        )
        return replace(
            self,
            queries=queries,
            query_mask=query_mask,
            keys=keys,
            key_mask=key_mask,
            takers=self._takers_among(index),
            centre=centre,
        )

    def _takers_among(self, index: Tensor) -> InverseIndex:
        """Find the takers of each key among some tiles, int64 [B, S]: [B, M, R]."""
        batch, count = index.shape
        tiles, keys = self.keys.shape[1:]
        number = torch.full((batch, tiles), -1, dtype=torch.int64, device=index.device)
        number = number.scatter_(
            1, index, torch.arange(count, device=index.device).expand(batch, -1)
        )[:, self.takers.index[0] // keys]
        chosen = self.takers.real & (number >= 0)
        return InverseIndex((number * keys + self.takers.index % keys).where(chosen, 0), chosen)

    def to_tile_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """Bring queries of all samples alike into tile order: N in dimension ``dim`` → T·Q.

        Holds for all tiles, as ``from_tile_order``, in which padding is dropped. So its gradient is
        0, and that of the queries is that of their slots.
        """
        return permute_rows(x, self.queries.flatten(), self.slots, dim)

    def from_tile_order(self, x: Tensor, dim: int = 1) -> Tensor:
        """Bring queries of all tiles back into the grid's order: T·Q in dimension ``dim`` → N."""
        padding = None if self.queries.numel() == len(self.slots) else ~self.query_mask.flatten()
        return permute_rows(x, self.slots, self.queries.flatten(), dim, padding)

    def split_queries(self, x: Tensor) -> Tensor:
        """Separate queries in tile order by tile: [B, H, T·Q, d] → [B·T, H, Q, d]."""
        return rearrange(x, "b h (t q) d -> (b t) h q d", t=self.queries.shape[1])

    def gather_keys(self, x: Tensor) -> Tensor:
        """Collect each tile's keys (or values): [B, H, M, d] → [B·T, H, K, d]."""
        heads = x.shape[1]
        rows = gather_rows(x.transpose(1, 2).flatten(2), self.keys.flatten(1), self.takers)
        return rearrange(rows, "b (t k) (h d) -> (b t) h k d", t=self.keys.shape[1], h=heads)

    def split_places(
        self, places: Tensor, context_places: Tensor, batch: int
    ) -> tuple[Tensor, Tensor]:
        """Separate places by tile, and measure them from the tile's centre, in cells.

        Queries [B or 1, T·Q, 2] and keys [B or 1, M, 2] → [B·T, Q, 2] and [B·T, K, 2]. So the
        numbers stay small in a grid of any size, and bfloat16 keeps neighbours apart.
        """
        own = rearrange(
            places, "b (t q) c -> b t q c", t=self.queries.shape[1]
        ) - self.centre.unsqueeze(2)
        sample = torch.arange(len(context_places), device=places.device).view(-1, 1, 1)
        theirs = context_places[sample, self.keys] - self.centre.unsqueeze(2)
        return own.expand(batch, -1, -1, -1).flatten(0, 1), theirs.expand(
            batch, -1, -1, -1
        ).flatten(0, 1)

    def mask(self, batch: int) -> Tensor | None:
        """Mask of gathered keys for ``attend``, False for padding: bool [B·T, 1, 1, K].

        None where there is no padding: a GPU's fastest kernels take no mask.
        """
        if not self.padded:
            return None
        return rearrange(self.key_mask.expand(batch, -1, -1), "b t k -> (b t) 1 1 k")

    def join_queries(self, x: Tensor) -> Tensor:
        """Invert split_queries: [B·T, H, Q, d] → [B, H, T·Q, d]."""
        return rearrange(x, "(b t) h q d -> b h (t q) d", t=self.queries.shape[1])


@cached_tensors(32)
def _tiles_between(
    queries: Size,
    keys: Size,
    grid: Size,
    tile: int,
    halo: float,
    spans: tuple[tuple[int, int, int], tuple[int, int, int]],
    device: torch.device | None,
) -> Tiles:
    """See Tiles.between. ``spans``: start, stop and step of the part's rows and columns."""
    y, x = (
        _axis(
            positions(queries[i], grid[i], slice(*spans[i])),
            positions(keys[i], grid[i]),
            grid[i],
            tile,
            halo,
        )
        for i in (0, 1)
    )
    rows, columns = (len(positions(queries[i], grid[i], slice(*spans[i]))) for i in (0, 1))
    index, query_mask = (
        _crossed(y.queries, x.queries, columns),
        _crossed(y.query_mask, x.query_mask),
    )
    keys_of_tiles, key_mask = (
        _crossed(y.keys, x.keys, x.part.stop - x.part.start),
        _crossed(y.key_mask, x.key_mask),
    )
    takers, real = _takers(
        keys_of_tiles[key_mask],
        np.flatnonzero(key_mask),
        (y.part.stop - y.part.start) * (x.part.stop - x.part.start),
    )
    slots = np.empty(rows * columns, dtype=np.int64)
    slots[index[query_mask]] = np.flatnonzero(query_mask)
    centre = np.stack(np.broadcast_arrays(x.middle[None, :], y.middle[:, None]), axis=-1).reshape(
        -1, 2
    )

    def tensor(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device, dtype, non_blocking=True)

    return Tiles(
        tensor(index[None], torch.int64),
        tensor(query_mask[None], torch.bool),
        tensor(keys_of_tiles[None], torch.int64),
        tensor(key_mask[None], torch.bool),
        InverseIndex(tensor(takers[None], torch.int64), tensor(real[None], torch.bool)),
        bool((~key_mask).any()),
        tensor(centre[None], torch.float32),
        tensor(slots, torch.int64),
        (y.part, x.part),
    )


def _takers(keys: np.ndarray, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """List at which places each of ``count`` keys is: keys, places int64 [E] → [M, R]."""
    order = np.argsort(keys, kind="stable")
    keys, places = keys[order], places[order]
    of_each = np.bincount(keys, minlength=count)
    number = np.arange(len(keys)) - np.repeat(np.cumsum(of_each) - of_each, of_each)
    takers = np.zeros((count, of_each.max()), dtype=np.int64)
    takers[keys, number] = places
    return takers, np.arange(takers.shape[1]) < of_each[:, None]


def _crossed(y: np.ndarray, x: np.ndarray, width: int = 0) -> np.ndarray:
    """Combine rows [t_y, n_y] and columns [t_x, n_x] of tiles → [t_y·t_x, n_y·n_x].

    Indices become indices into a grid that is ``width`` wide; masks (no width) hold on both axes.
    """
    y, x = y[:, None, :, None], x[None, :, None, :]
    both = y * width + x if width else y & x
    return both.reshape(both.shape[0] * both.shape[1], -1)
