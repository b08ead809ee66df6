"""Tiled attention: which tokens of a grid the tokens of a tile see.

A grid is cut into square tiles; the last of a row or column is smaller where the sides do not
divide. The tokens in a tile, its queries, see the tokens in it and in a halo around it, its keys.
What a token sees depends neither on the grid's size, but for its borders, nor on which other tokens
are computed along with it.

The keys that a tile sees are a range of each axis. All tiles have as many slots for queries and for
keys as the fullest tile needs, so that they form tensors. The slots left over in the other tiles,
called padding, repeat the last index and are masked.

Shape letters: B batch · t, T tiles of an axis, of the grid · q, Q queries of a tile on an axis, in
all · k, K keys of a tile on an axis, in all · N tokens · H heads · d width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from r2id.constants import cached_tensors
from r2id.models.coords import Size
from r2id.models.rows import InverseIndex, gather_rows, permute_rows


@dataclass(frozen=True)
class _Axis:
    """The tiles of one axis."""

    queries: np.ndarray
    """Index of each tile's queries, int64 [t, q]."""
    query_mask: np.ndarray
    """False for padding, bool [t, q]."""
    keys: np.ndarray
    """Index of each tile's keys, int64 [t, k]."""
    key_mask: np.ndarray
    """False for padding, bool [t, k]."""


def _axis(count: int, tile: int, halo: int) -> _Axis:
    """Build the tiles of an axis of so many tokens."""
    start = np.arange(0, count, tile, dtype=np.int64)
    stop = np.minimum(start + tile, count)
    seen = np.maximum(start - halo, 0), np.minimum(stop + halo, count)
    return _Axis(*_ranges(start, stop), *_ranges(*seen))


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write ranges as rows of one length, padded with the last index of each.

    start, stop int64 [t] → indices int64 [t, n] and their mask bool [t, n], False for padding.
    """
    index = start[:, None] + np.arange((stop - start).max())
    return np.minimum(index, stop[:, None] - 1), index < stop[:, None]


@dataclass(frozen=True)
class Tiles:
    """The tiles of a grid, and the queries and keys of each, the same for all samples."""

    queries: Tensor
    """Index of each tile's queries among all N, row by row: int64 [T, Q]."""
    query_mask: Tensor
    """False for padding: bool [T, Q]."""
    keys: Tensor
    """Index of each tile's keys among all N, row by row: int64 [T, K]."""
    key_mask: Tensor
    """False for padding: bool [T, K]."""
    takers: InverseIndex
    """Which of the T·K keys of all tiles, padding left out, each of the N tokens is."""
    padded: bool
    """Whether any tile has padding among its keys."""
    slots: Tensor
    """Which of the T·Q queries of all tiles each token is: int64 [N]."""

    def split_queries(self, x: Tensor) -> Tensor:
        """Collect each tile's queries: [B, H, N, d] → [B·T, H, Q, d].

        ``join_queries`` drops padding. So its gradient is 0, and that of a token is that of its
        slot.
        """
        rows = permute_rows(x, self.queries.flatten(), self.slots, 2)
        return rearrange(rows, "b h (t q) d -> (b t) h q d", t=len(self.queries))

    def join_queries(self, x: Tensor) -> Tensor:
        """Invert split_queries: [B·T, H, Q, d] → [B, H, N, d]."""
        rows = rearrange(x, "(b t) h q d -> b h (t q) d", t=len(self.queries))
        padding = None if self.queries.numel() == len(self.slots) else ~self.query_mask.flatten()
        return permute_rows(rows, self.slots, self.queries.flatten(), 2, padding)

    def gather_keys(self, x: Tensor) -> Tensor:
        """Collect each tile's keys (or values): [B, H, N, d] → [B·T, H, K, d]."""
        heads = x.shape[1]
        rows = gather_rows(x.transpose(1, 2).flatten(2), self.keys.flatten()[None], self.takers)
        return rearrange(rows, "b (t k) (h d) -> (b t) h k d", t=len(self.keys), h=heads)

    def mask(self, batch: int) -> Tensor | None:
        """Mask of gathered keys for ``attend``, False for padding: bool [B·T, 1, 1, K].

        None where there is no padding: a GPU's fastest kernels take no mask.
        """
        if not self.padded:
            return None
        return rearrange(self.key_mask.expand(batch, -1, -1), "b t k -> (b t) 1 1 k")


@cached_tensors(32)
def tiles_of(grid: Size, tile: int, halo: int, device: torch.device | None = None) -> Tiles:
    """Cut a grid (h, w) into tiles of ``tile`` × ``tile`` tokens with a halo of ``halo`` tokens.

    They are shared: nothing may write to them.
    """
    y, x = (_axis(side, tile, halo) for side in grid)
    queries, query_mask = (
        _crossed(y.queries, x.queries, grid[1]),
        _crossed(y.query_mask, x.query_mask),
    )
    keys, key_mask = _crossed(y.keys, x.keys, grid[1]), _crossed(y.key_mask, x.key_mask)
    takers, real = _takers(keys[key_mask], np.flatnonzero(key_mask), grid[0] * grid[1])
    slots = np.empty(grid[0] * grid[1], dtype=np.int64)
    slots[queries[query_mask]] = np.flatnonzero(query_mask)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Tiles(
        tensor(queries),
        tensor(query_mask),
        tensor(keys),
        tensor(key_mask),
        InverseIndex(tensor(takers[None]), tensor(real[None])),
        bool((~key_mask).any()),
        tensor(slots),
    )


def _takers(keys: np.ndarray, places: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """List at which places each of ``count`` keys is: keys, places int64 [E] → [N, R]."""
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
