"""RIAE's decoder by attention: points anywhere in an image query the latent cells.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels
· M = h·w latents · P points that are rendered · D width.
"""

from __future__ import annotations

import math
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.attention import Context, RMSNorm
from r2id.models.cells import to_points
from r2id.models.coords import OnProgress, Part, Size, Window
from r2id.models.latent_blocks import LatentBlocks
from r2id.models.layers import CrossBlock, ExactLinear, zero_linear
from r2id.models.resampling import resample
from r2id.models.tiles import Tiles
from r2id.models.visibility import DecodeFn, Visibility

_BAND = 1 << 18
"""Where a pixel is the mean of several points: how many points are held at once, at least those of
one row of pixels."""


class AttentionDecoder(nn.Module):
    """Points start as features of their places and gather latents by cross-attention."""

    stored_as: ClassVar = {"cross_blocks": "decoder", "latent_blocks": "decoder_latent"}
    """Names in checkpoints of layers that have other names here."""

    def __init__(self, config: RiaeConfig, channels: int, visibility: Visibility) -> None:
        super().__init__()
        self.config, self.visibility = config, visibility
        width, pixel_width = config.width, config.pixel_width
        heads = config.pixel_heads
        self.latent_in = nn.Linear(config.latent_channels + visibility.cell_dim, width)
        self.latent_blocks = LatentBlocks(config, visibility)
        self.point_in = nn.Sequential(
            nn.Linear(visibility.point_dim, pixel_width),
            nn.SiLU(),
            nn.Linear(pixel_width, pixel_width),
        )
        self.cross_blocks = nn.ModuleList(
            CrossBlock(pixel_width, width, heads, config.ffn_ratio, config.gaussian_window)
            for _ in range(config.decoder_blocks)
        )
        # An untrained decoder draws 0, grey, everywhere.
        self.to_colour = nn.Sequential(RMSNorm(pixel_width), zero_linear(pixel_width, channels))
        if config.linear:
            self.from_code = ExactLinear(config.latent_channels, channels * config.cell**2)

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [*self.latent_blocks, *self.cross_blocks]

    def spread_latents(self, latents: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Make what points attend to: latents [B, M, L] at cells [1, M, 4] → kv [B, M, D].

        Once per image, however many points are rendered.
        """
        place = self.visibility.cell_features(cells, grid).expand(latents.shape[0], -1, -1)
        x = self.latent_in(torch.cat([latents, place], dim=-1))
        return self.latent_blocks.through(x, cells, grid)

    def decode_linearly(self, latents: Tensor, grid: Size) -> Tensor | None:
        """Decode latents [B, M, L] at all points of the cells by the linear map alone, if any.

        Returns pictures [B, C, h·cell, w·cell], of which any other place is interpolated.
        """
        if not self.config.linear:
            return None
        colours = self.from_code(latents).unflatten(1, grid)
        return to_points(colours, self.config.cell)

    def decode_points(
        self,
        kv: Tensor,
        cells: Tensor,
        points: Tensor,
        size: Size,
        grid: Size,
        tiles: Tiles | None = None,
        contexts: list[Context] | None = None,
    ) -> Tensor:
        """Decode points of images of ``size`` (H, W).

        kv [B, M, D] of spread_latents at cells [B or 1, M, 4], points [B or 1, P, 4] → colours
        [B, P, C]. With ``tiles``, points are in tile order, and kv and cells are those of
        ``tiles.part``. ``contexts``, those of all blocks, are what blocks would make of kv.
        """
        x = self.point_in(self.visibility.point_features(points, size, grid))
        x = x.expand(kv.shape[0], -1, -1)
        cell_places, point_places = coords.in_cells(cells, grid), coords.in_cells(points, grid)
        for number, block in enumerate(self.cross_blocks):
            context = contexts[number] if contexts else kv
            x = block(x, context, point_places, cell_places, tiles)
        return self.to_colour(x).float()

    def points_per_pixel(self, grid: Size, size: Size) -> Size:
        """Say of how many points, down and across, a pixel of an image (H, W) is the mean.

        Training showed pixels of up to 1/smallest of the images' own. Where a picture is drawn so
        small that its pixels are larger than those, one point in each would alias; so each pixel is
        the mean of as many points as it takes for none to stand for a larger area than in training.
        """
        # The grid was rounded to whole cells, so an image was at least (cells − ½)·downsample high.
        smallest = self.config.decode_scales[0] if self.config.decode_scales else 1.0
        down, across = (
            max(1, math.ceil((smallest * cells - 0.5) * self.config.downsample / side))
            for cells, side in zip(grid, size, strict=True)
        )
        return down, across

    def decode(
        self,
        latents: Tensor,
        size: Size,
        window: Window | None = None,
        native: Size | None = None,
        advance: OnProgress | None = None,
    ) -> Tensor:
        """Decode raw latents [B, L, h, w] at any size, or a window of it; see RIAE.decode.

        ``native`` is not used: cells tile the whole image.
        """
        grid: Size = (latents.shape[2], latents.shape[3])
        part = coords.part_of(size, window)
        cells = coords.grid_coordinates(grid, device=latents.device).unsqueeze(0)
        count = math.prod(side.stop - side.start for side in part) * math.prod(
            self.points_per_pixel(grid, size)
        )
        at_once = self.visibility.images_decoded_at_once(count, len(latents), latents.device)
        images = []
        for chunk in latents.split(at_once):
            flat = rearrange(chunk, "b l h w -> b (h w) l")
            kv = self.spread_latents(flat, cells, grid)
            contexts = self._contexts(kv, cells, grid)
            draw = partial(self.decode_points, contexts=contexts)
            drawn = self._render(draw, kv, cells, grid, size, part)
            linear = self.decode_linearly(flat, grid)
            images.append(drawn if linear is None else drawn + resample(linear, size, part))
        if advance:
            advance(math.prod(side.stop - side.start for side in part))
        return torch.cat(images)

    def _contexts(self, kv: Tensor, cells: Tensor, grid: Size) -> list[Context] | None:
        """Make what all points attend to, once; None where each tile attends to its own."""
        if self.visibility.is_local:
            return None
        places, contexts = coords.in_cells(cells, grid), []
        for block in self.cross_blocks:
            assert isinstance(block, CrossBlock)
            contexts.append(block.context(kv, places))
        return contexts

    def _render(
        self, draw: DecodeFn, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        """Render a part of an image, in bands of rows where pixels are means of points."""
        down, across = points = self.points_per_pixel(grid, size)
        if points == (1, 1):
            return self.visibility.decode(draw, kv, cells, grid, size, part)
        rows, columns = part
        fine = (size[0] * down, size[1] * across)
        wide = slice(columns.start * across, columns.stop * across)
        band = max(1, _BAND // (len(kv) * down * (wide.stop - wide.start)))
        bands = []
        for y in range(rows.start, rows.stop, band):
            high = slice(y * down, min(y + band, rows.stop) * down)
            drawn = self.visibility.decode(draw, kv, cells, grid, fine, (high, wide))
            bands.append(F.avg_pool2d(drawn, points))
        return torch.cat(bands, dim=2)
