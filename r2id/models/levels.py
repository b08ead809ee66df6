"""Hourglass levels of R2ID: fine grids around the coarse one, with local attention.

Each level runs blocks on its grid, merges squares of 2×2 tokens to the grid of the next level, and
on the way back splits them again and runs as many blocks. Its attention is tiled, so that its cost
grows linearly with the grid; only the coarsest grid is seen whole (HDiT, Crowson et al. 2024,
arXiv:2401.11605).

A grid may have any size. The coarse one has ⌈h/2⌉ × ⌈w/2⌉ cells of 2×2 tokens, and a token belongs
to the cell that holds its centre. Cells at the lower and the right border of odd sides hang over
the edge; where they hold no token, their nearest one counts again. So a side of 1 stays 1, and
merging works in odd grids as it does in even ones.

Shape letters: B batch · h, w grid · N = h·w tokens · M tokens of the coarse grid · D, C widths of a
token here and there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from r2id.config import R2idConfig
from r2id.errors import InputError
from r2id.models.coords import Size
from r2id.models.layers import DiffusionBlock
from r2id.models.mixing import Mix, local


class Skip(NamedTuple):
    """What the way up needs of the way down at a level."""

    tokens: Tensor
    """Tokens [B, N, D] before they are merged."""
    grid: Size
    mix: Mix
    """How they attend to each other."""


def coarse(grid: Size) -> Size:
    """Return the number of cells of 2×2 tokens that a grid touches: (⌈h/2⌉, ⌈w/2⌉)."""
    return (grid[0] + 1) // 2, (grid[1] + 1) // 2


def check_halvings(setting: str, count: int, grid: Size) -> None:
    """Raise InputError when halving a grid's sides ``count`` times leaves less than one cell.

    ``setting`` is the name of what sets the number.
    """
    allowed = min(grid).bit_length() - 1
    if count > allowed:
        raise InputError(
            f"{setting}: {count} on training grids of {grid[0]}x{grid[1]} cells: must be at most "
            f"{allowed}, because each halves the sides"
        )


def group_2x2(tokens: Tensor, grid: Size) -> Tensor:
    """Collect the four tokens of each coarse cell, row by row: [B, N, D] → [B, M, 4, D]."""
    cells = rearrange(tokens, "b (h w) d -> b h w d", h=grid[0])
    if grid[0] % 2:
        cells = torch.cat([cells, cells[:, -1:]], dim=1)
    if grid[1] % 2:
        cells = torch.cat([cells, cells[:, :, -1:]], dim=2)
    return rearrange(cells, "b (h i) (w j) d -> b (h w) (i j) d", i=2, j=2)


class Merge(nn.Module):
    """Makes one coarse token of four, each by a linear map of its place in the cell."""

    def __init__(self, width: int, coarse_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4 * width, coarse_width, bias=False)

    def forward(self, tokens: Tensor, grid: Size) -> Tensor:
        """tokens [B, N, D] of a grid → [B, M, C]."""
        return self.linear(group_2x2(tokens, grid).flatten(2))


class Split(nn.Module):
    """Splits each coarse token into four, and interpolates between them and the skip tokens.

    The share of the new tokens is learned; it begins at one half.
    """

    def __init__(self, width: int, coarse_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(coarse_width, 4 * width, bias=False)
        self.share = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, tokens: Tensor, skip: Tensor, grid: Size) -> Tensor:
        """tokens [B, M, C] of the coarse grid, skip [B, N, D] of the fine one → [B, N, D]."""
        new = rearrange(
            self.linear(tokens), "b (h w) (i j d) -> b (h i) (w j) d", h=coarse(grid)[0], i=2, j=2
        )
        new = new[:, : grid[0], : grid[1]].flatten(1, 2).to(skip.dtype)
        return torch.lerp(skip, new, self.share.to(skip.dtype))


class Level(nn.Module):
    """The modules of one level; ``Levels`` runs them."""

    def __init__(
        self, width: int, blocks: int, coarse_width: int, time_width: int, heads: int, ratio: float
    ) -> None:
        super().__init__()

        def stack() -> nn.ModuleList:
            # No dropout: the fine levels hold texture, which is hard to learn by heart.
            return nn.ModuleList(
                DiffusionBlock(width, heads, ratio, dropout=0.0, conditional=False)
                for _ in range(blocks)
            )

        self.time_in = nn.Linear(time_width, width)
        self.down, self.up = stack(), stack()
        self.merge, self.split = Merge(width, coarse_width), Split(width, coarse_width)


class Levels(nn.ModuleList):
    """The levels around the coarsest grid, the finest first; there may be none."""

    def __init__(self, config: R2idConfig) -> None:
        widths = [level.width for level in config.levels] + [config.width]
        head_width = config.width // config.heads
        super().__init__(
            Level(
                level.width,
                level.blocks,
                widths[number + 1],
                config.width,
                level.width // head_width,
                config.ffn_ratio,
            )
            for number, level in enumerate(config.levels)
        )
        self.config = config

    def _ordered(self) -> list[Level]:
        return [level for level in self if isinstance(level, Level)]

    def blocks_down(self) -> list[nn.Module]:
        """The blocks of the way down, in order."""
        return [block for level in self._ordered() for block in level.down]

    def blocks_up(self) -> list[nn.Module]:
        """The blocks of the way up, in order."""
        return [block for level in reversed(self._ordered()) for block in level.up]

    def descend(self, tokens: Tensor, time: Tensor, grid: Size) -> tuple[Tensor, Size, list[Skip]]:
        """Bring tokens [B, N, D] of a grid to the coarsest one, under time embeddings [B, C].

        Returns the coarsest grid's tokens [B, M, C], its size, and what ``ascend`` needs.
        """
        passed = []
        for level in self._ordered():
            mix, level_time = local(self.config, grid, tokens.device), level.time_in(time)
            for block in level.down:
                tokens = block(tokens, level_time, mix=mix)
            passed.append(Skip(tokens, grid, mix))
            tokens, grid = level.merge(tokens, grid), coarse(grid)
        return tokens, grid, passed

    def ascend(self, tokens: Tensor, time: Tensor, passed: list[Skip]) -> Tensor:
        """Bring tokens [K·B, M, C] back to the grid that ``descend`` began with → [K·B, N, D].

        They are all samples under each of K conditions, and so are the time embeddings [K·B, C].
        """
        for level, (before, grid, mix) in zip(
            reversed(self._ordered()), reversed(passed), strict=True
        ):
            skip = repeat(before, "b ... -> (k b) ...", k=len(tokens) // len(before))
            tokens, level_time = level.split(tokens, skip, grid), level.time_in(time)
            for block in level.up:
                tokens = block(tokens, level_time, mix=mix)
        return tokens
