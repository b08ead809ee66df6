"""RIAE's encoder by attention: latent cells query the pixels of an image.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels · N
pixels that are seen · M = h·w latents · D width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.images import resize
from r2id.models import coords
from r2id.models.attention import RMSNorm
from r2id.models.cells import to_cells
from r2id.models.coords import OnProgress, Size
from r2id.models.latent_blocks import LatentBlocks
from r2id.models.layers import CrossBlock, ExactLinear, zero_linear
from r2id.models.tiles import Tiles
from r2id.models.visibility import Visibility


class AttentionEncoder(nn.Module):
    """Latent cells start as features of their places and gather colours by cross-attention."""

    stored_as: ClassVar = {"cross_blocks": "encoder", "latent_blocks": "encoder_latent"}
    """Names in checkpoints of layers that have other names here."""

    def __init__(self, config: RiaeConfig, channels: int, visibility: Visibility) -> None:
        super().__init__()
        self.config, self.visibility = config, visibility
        width, pixel_width = config.width, config.pixel_width
        self.pixel_in = nn.Sequential(
            nn.Linear(channels + visibility.point_dim, pixel_width),
            nn.SiLU(),
            nn.Linear(pixel_width, pixel_width),
        )
        self.cell_in = nn.Linear(visibility.cell_dim, width)
        self.cross_blocks = nn.ModuleList(
            CrossBlock(width, pixel_width, config.heads, config.ffn_ratio, config.gaussian_window)
            for _ in range(config.encoder_blocks)
        )
        self.latent_blocks = LatentBlocks(config, visibility)
        last = zero_linear if config.linear else nn.Linear
        self.to_latent = nn.Sequential(RMSNorm(width), last(width, config.latent_channels))
        if config.linear:
            self.to_code = ExactLinear(channels * config.cell**2, config.latent_channels)

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [*self.cross_blocks, *self.latent_blocks]

    def encode(self, images: Tensor, native: Size, advance: OnProgress | None = None) -> Tensor:
        """Encode images [B, C, H, W], a few at a time, on the grid of an image of ``native`` size.

        Returns raw latents [B, L, h, w].
        """
        grid = self.config.grid_for(native)
        cells = coords.grid_coordinates(grid, device=images.device).unsqueeze(0)
        pixels = images.shape[2] * images.shape[3]
        at_once = self.visibility.images_encoded_at_once(pixels, images.device)
        latents = torch.cat(
            [
                self._to_latents(
                    self.visibility.encode(self._query_pixels, some, cells, grid), cells, grid
                )
                + self.encode_linearly(some, grid)
                for some in images.split(at_once)
            ]
        )
        if advance:
            advance(math.prod(native))
        return rearrange(latents, "b (h w) l -> b l h w", h=grid[0])

    def encode_linearly(self, images: Tensor, grid: Size) -> Tensor:
        """Encode images [B, C, H, W] by the linear map alone, if there is one: [B, M, L], or 0.

        Each cell has cell×cell points, and images are resized to all of these.
        """
        if not self.config.linear:
            return images.new_zeros(())
        cell = self.config.cell
        points = resize(images, (grid[0] * cell, grid[1] * cell))
        return self.to_code(to_cells(points, cell)).flatten(1, 2)

    def encode_points(
        self,
        colours: Tensor,
        points: Tensor,
        size: Size,
        cells: Tensor,
        grid: Size,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Encode points of images into the cells of a latent grid (h, w).

        Colours [B, N, C] at points [B or 1, N, 4] of images of ``size`` (H, W), cells [1, M, 4] →
        raw latents [B, M, L]. With ``tiled`` attention, cells and points must be whole grids, and
        ``tiles`` those of the cells.
        """
        values = self._query_pixels(colours, points, size, cells, grid, tiles)
        return self._to_latents(values, cells, grid)

    def _query_pixels(
        self,
        colours: Tensor,
        points: Tensor,
        size: Size,
        cells: Tensor,
        grid: Size,
        tiles: Tiles | None,
    ) -> Tensor:
        """Gather colours [B, N, C] at points in the cells [1, M, 4]: [B, M, D]."""
        batch = colours.shape[0]
        place = self.visibility.point_features(points, size, grid).expand(batch, -1, -1)
        pixels = self.pixel_in(torch.cat([colours, place], dim=-1))
        if tiles is not None:
            cells = tiles.to_tile_order(cells)
        x = self.cell_in(self.visibility.cell_features(cells, grid)).expand(batch, -1, -1)
        cell_places, pixel_places = coords.in_cells(cells, grid), coords.in_cells(points, grid)
        for block in self.cross_blocks:
            x = block(x, pixels, cell_places, pixel_places, tiles)
        return x if tiles is None else tiles.from_tile_order(x)

    def _to_latents(self, x: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Let all cells [1, M, 4] exchange what they gathered: [B, M, D] → latents [B, M, L]."""
        x = self.latent_blocks.through(x, cells, grid)
        # Float32 under autocast too: latents are stored, and diffusion normalises them.
        latents = self.to_latent(x).float()
        return torch.tanh(latents) if self.config.bounded else latents
