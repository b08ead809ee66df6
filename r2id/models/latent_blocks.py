"""Blocks on the latent grid, at the end of RIAE's encoder and at the start of its decoder.

Shape letters: B batch · h, w latent grid · M = h·w latents · D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.coords import Size
from r2id.models.layers import SelfBlock
from r2id.models.visibility import Visibility


class LatentBlocks(nn.ModuleList):
    """Self-attention blocks between latent cells, all of them or those of a tile.

    The visibility's ``latent_tiles`` decides which.
    """

    def __init__(self, config: RiaeConfig, visibility: Visibility) -> None:
        super().__init__(
            SelfBlock(config.width, config.heads, config.ffn_ratio, config.gaussian_window)
            for _ in range(config.latent_blocks)
        )
        self.visibility = visibility

    def through(self, x: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Pass [B, M, D] at all cells [1, M, 4] of a grid (h, w) through the blocks."""
        tiles = self.visibility.latent_tiles(grid, x.device) if len(self) else None
        for block in self:
            x = block(x, coords.in_cells(cells, grid), tiles)
        return x
