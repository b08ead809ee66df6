"""How the tokens of a diffusion block attend to each other: all to all, or at less cost.

To add a kind, write a function from queries, keys and values to what they become, add a line to
ATTENTION_KINDS and add its name to AttentionKind in r2id/config/models.py. It has to work on grids
of any shape, a single token among them, and the shapes in it must not depend on the values of
tensors (no ``nonzero``, ``item`` or boolean index): training and ``r2id plan`` count its operations
on tensors that have no contents (r2id.models.tracing). tests/models/test_mixing.py tries all this
for every kind in ATTENTION_KINDS; add a test that compares yours with dense attention under a mask.

Shape letters: B batch · H heads · N = h·w tokens of a grid · d width of a head · G groups · S
tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from r2id import rng
from r2id.config import R2idConfig
from r2id.config.models import AttentionKind
from r2id.models.attention import attend
from r2id.models.coords import Size
from r2id.models.rows import permute_rows
from r2id.models.tiles import Tiles, tiles_of

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, H, N, d] → [B, H, N, d]."""


@dataclass(frozen=True)
class Pass:
    """What the blocks of one pass through the model have in common."""

    config: R2idConfig
    grid: Size
    device: torch.device
    cloud_key: Tensor | None
    """Random key of cloud attention's groups; without one, as in sampling, all attend to all."""

    @cached_property
    def tiles(self) -> Tiles:
        """Tiles of the grid, built once for all tiled blocks."""
        return tiles_of(self.grid, self.config.tile, self.config.halo, self.device)

    def cloud(self, number: int) -> Mix:
        """Cloud attention of block ``number``; each block has groups of its own."""
        tokens = self.grid[0] * self.grid[1]
        groups = max(1, round(tokens / self.config.cloud_tokens))
        if self.cloud_key is None or groups == 1:
            return attend
        order = rng.subset(rng.fold(self.cloud_key, number), tokens, tokens)
        order = order.to(self.device, non_blocking=True)
        return partial(cloud, order=order, groups=groups)


ATTENTION_KINDS: dict[AttentionKind, Callable[[Pass, int], Mix]] = {
    "full": lambda _shared, _number: attend,
    "cloud": lambda shared, number: shared.cloud(number),
    "axial": lambda shared, _number: partial(axial, grid=shared.grid),
    "linear": lambda _shared, _number: linear,
    "tiled": lambda shared, _number: partial(tiled, tiles=shared.tiles),
}
"""Name in ``r2id.attention`` → how block ``number`` of a pass attends."""


def mixes(
    config: R2idConfig,
    grid: Size,
    blocks: int,
    device: torch.device,
    cloud_key: Tensor | None = None,
) -> list[Mix]:
    """Choose how each block's tokens attend: the kinds of ``config.attention`` in turn."""
    shared, kinds = Pass(config, grid, device, cloud_key), config.attention
    return [ATTENTION_KINDS[kinds[i % len(kinds)]](shared, i) for i in range(blocks)]


def local(config: R2idConfig, grid: Size, device: torch.device) -> Mix:
    """Choose how tokens of a grid attend at the levels around the coarsest one: tiled."""
    return ATTENTION_KINDS["tiled"](Pass(config, grid, device, None), 0)


def axial(q: Tensor, k: Tensor, v: Tensor, grid: Size) -> Tensor:
    """Attend along rows in half of the heads and along columns in the others: cost N·(h + w).

    Ho et al. 2019, "Axial attention in multidimensional transformers", with both in one layer.
    """
    half, rows = q.shape[1] // 2, grid[0]

    def along(parts: list[Tensor], lines: str) -> Tensor:
        apart = (rearrange(part, f"b n (i j) d -> {lines}", i=rows) for part in parts)
        return rearrange(attend(*apart), f"{lines} -> b n (i j) d", i=rows, b=len(q))

    return torch.cat(
        [
            along([part[:, :half] for part in (q, k, v)], "(b i) n j d"),
            along([part[:, half:] for part in (q, k, v)], "(b j) n i d"),
        ],
        dim=1,
    )


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention φ(q)·Σφ(k)vᵀ / φ(q)·Σφ(k), φ = ELU + 1 (Katharopoulos et al. 2020).

    Costs N·d². In float32 under autocast too: the sums are long and the divisor may be small.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (F.elu(part.float()) + 1 for part in (q, k))
        total = torch.einsum("bhnd,bhne->bhde", keys, v.float())
        return (
            torch.einsum("bhnd,bhde->bhne", queries, total) / (queries @ keys.sum(2).unsqueeze(-1))
        ).to(v.dtype)


def cloud(q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: int) -> Tensor:
    """Attend within groups of tokens, taken from a random order [N]: cost N²/G.

    All groups are of one size, so the last one is filled up with tokens of the first. Its own
    tokens see them too; what becomes of them there is dropped, since they have their own group.
    """
    tokens = len(order)
    size = -(-tokens // groups)
    inverse, spare = torch.argsort(order), groups * size - tokens

    def apart(part: Tensor) -> Tensor:
        part = permute_rows(part, order, inverse, 2)
        filled = torch.cat([part, part[:, :, :spare]], dim=2) if spare else part
        return rearrange(filled, "b n (g s) d -> (b g) n s d", g=groups)

    mixed = rearrange(attend(*map(apart, (q, k, v))), "(b g) n s d -> b n (g s) d", g=groups)
    return permute_rows(mixed[:, :, :tokens], inverse, order, 2)


def tiled(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    """Attend within tiles and a halo around each: cost linear in N."""
    apart = tiles.split_queries(q), tiles.gather_keys(k), tiles.gather_keys(v)
    return tiles.join_queries(attend(*apart, tiles.mask(len(q))))
