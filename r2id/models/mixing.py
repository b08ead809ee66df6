"""How the tokens of a diffusion block attend to each other: all to all, or at less cost.

Shape letters: B batch · H heads · N = h·w tokens of a grid · d width of a head · G groups · S tokens of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from r2id import rng
from r2id.config import R2idConfig
from r2id.models.attention import attend
from r2id.models.coords import Size
from r2id.models.tiles import Tiles

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, H, N, d] → [B, H, N, d]."""


def mixes(
    config: R2idConfig,
    grid: Size,
    blocks: int,
    device: torch.device,
    cloud_key: Tensor | None = None,
) -> list[Mix]:
    """How each block's tokens attend, by ``config.attention``; ``cloud_key`` is the key of the random groups, and without it
    tokens see all others in their stead."""
    near: Mix = attend
    if "tiled" in config.attention:
        near = partial(
            tiled, tiles=Tiles.between(grid, grid, grid, config.tile, config.halo, device=device)
        )
    tokens = grid[0] * grid[1]
    groups = max(1, round(tokens / config.cloud_tokens))

    def mix(number: int) -> Mix:
        kind = config.attention[number % len(config.attention)]
        if kind == "axial":
            return partial(axial, grid=grid)
        if kind == "linear":
            return linear
        if kind == "tiled":
            return near
        if kind == "cloud" and cloud_key is not None and groups > 1:
            return partial(
                cloud, order=rng.subset(rng.fold(cloud_key, number), tokens, tokens), groups=groups
            )
        return attend

    return [mix(number) for number in range(blocks)]


def axial(q: Tensor, k: Tensor, v: Tensor, grid: Size) -> Tensor:
    """Half of the heads see the row of their token, the others its column (Ho et al. 2019, with both in one layer): cost
    N·(h + w)."""
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
    """φ(q)·Σφ(k)vᵀ / φ(q)·Σφ(k) with φ = ELU + 1 (Katharopoulos et al. 2020): cost N·d². In float32: the sums are long and
    the divisor may be small."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys = (F.elu(part.float()) + 1 for part in (q, k))
        total = torch.einsum("bhnd,bhne->bhde", keys, v.float())
        return (
            torch.einsum("bhnd,bhde->bhne", queries, total) / (queries @ keys.sum(2).unsqueeze(-1))
        ).to(v.dtype)


def cloud(q: Tensor, k: Tensor, v: Tensor, order: Tensor, groups: int) -> Tensor:
    """Tokens in groups of the random order [N] see their group alone: cost N²/G. The last group is filled up with tokens of
    the first, which it lets be seen, but whose result is their own group's."""
    tokens = len(order)
    size = -(-tokens // groups)
    filled = torch.cat([order, order[: groups * size - tokens]])
    apart = (
        rearrange(part[:, :, filled], "b n (g s) d -> (b g) n s d", g=groups) for part in (q, k, v)
    )
    mixed = rearrange(attend(*apart), "(b g) n s d -> b n (g s) d", g=groups)
    return mixed[:, :, torch.argsort(order)]


def tiled(q: Tensor, k: Tensor, v: Tensor, tiles: Tiles) -> Tensor:
    """Tokens see those of their tile and of a halo around it: cost linear in N."""
    queries = tiles.split_queries(q[:, :, tiles.queries.flatten()])
    mixed = tiles.joined(
        attend(queries, tiles.gather_keys(k), tiles.gather_keys(v), tiles.mask(len(q)))
    )
    return mixed[:, :, tiles.slots]
