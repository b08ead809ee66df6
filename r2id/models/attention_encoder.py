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
from r2id.models.layers import CrossBlock, ExactLinear, zero_linear

_CHUNK = 1 << 19
"""How many pixels are encoded at once outside training, at least those of one image, so that memory
does not grow with the number of images."""


class AttentionEncoder(nn.Module):
    """Latent cells start as features of their places and gather colours by cross-attention."""

    stored_as: ClassVar = {"cross_blocks": "encoder"}
    """Names in checkpoints of layers that have other names here."""

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        width, pixel_width = config.width, config.pixel_width
        self.pixel_in = nn.Sequential(
            nn.Linear(channels + coords.point_dim(config.fourier), pixel_width),
            nn.SiLU(),
            nn.Linear(pixel_width, pixel_width),
        )
        self.cell_in = nn.Linear(coords.fourier_dim(config.fourier), width)
        self.cross_blocks = nn.ModuleList(
            CrossBlock(width, pixel_width, config.heads, config.ffn_ratio, config.gaussian_window)
            for _ in range(config.encoder_blocks)
        )
        last = zero_linear if config.linear else nn.Linear
        self.to_latent = nn.Sequential(RMSNorm(width), last(width, config.latent_channels))
        if config.linear:
            self.to_code = ExactLinear(channels * config.cell**2, config.latent_channels)

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [*self.cross_blocks]

    def encode(self, images: Tensor, native: Size, advance: OnProgress | None = None) -> Tensor:
        """Encode images [B, C, H, W], a few at a time, on the grid of an image of ``native`` size.

        Returns raw latents [B, L, h, w].
        """
        grid, size = self.config.grid_for(native), (images.shape[2], images.shape[3])
        cells = coords.grid_coordinates(grid, device=images.device).unsqueeze(0)
        points = coords.grid_coordinates(size, grid, images.device).unsqueeze(0)
        latents = torch.cat(
            [
                self.encode_points(rearrange(some, "b c h w -> b (h w) c"), points, cells, grid)
                + self.encode_linearly(some, grid)
                for some in images.split(max(1, _CHUNK // math.prod(size)))
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

    def encode_points(self, colours: Tensor, points: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Encode points of images into the cells of a latent grid (h, w).

        Colours [B, N, C] at points [B or 1, N, 4], cells [1, M, 4] → raw latents [B, M, L].
        """
        batch, powers = colours.shape[0], self.config.fourier
        place = coords.point_features(points, grid, powers).expand(batch, -1, -1)
        pixels = self.pixel_in(torch.cat([colours, place], dim=-1))
        x = self.cell_in(coords.fourier_features(cells, powers)).expand(batch, -1, -1)
        cell_places, pixel_places = coords.in_cells(cells, grid), coords.in_cells(points, grid)
        for block in self.cross_blocks:
            x = block(x, pixels, cell_places, pixel_places)
        # Float32 under autocast too: latents are stored, and diffusion normalises them.
        return self.to_latent(x).float()
