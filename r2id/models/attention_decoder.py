"""RIAE's decoder by attention: points anywhere in an image query the latent cells.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels
· M = h·w latents · P points that are rendered · D width.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.attention import Context, RMSNorm, as_on_gpu
from r2id.models.cells import to_points
from r2id.models.coords import OnProgress, Part, Size, Window
from r2id.models.layers import CrossBlock, ExactLinear, zero_linear
from r2id.models.resampling import resample

# How many points are decoded at once outside training, so that memory does not grow with them.
_CHUNK = 1 << 13
_GPU_FACTOR = 8
"""How many times as many points a GPU takes at once, in fewer kernels: 6 to 7 kB each in
configs/mnist/published-riae.toml. On a CPU they should fit into its cache."""
_BAND = 1 << 18
"""Where a pixel is the mean of several points: how many points are held at once, at least those of
one row of pixels."""


class AttentionDecoder(nn.Module):
    """Points start as features of their places and gather latents by cross-attention."""

    stored_as: ClassVar = {"cross_blocks": "decoder"}
    """Names in checkpoints of layers that have other names here."""

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config = config
        width, pixel_width = config.width, config.pixel_width
        heads = config.pixel_heads
        place = coords.fourier_dim(config.fourier)
        self.latent_in = nn.Linear(config.latent_channels + place, width)
        self.point_in = nn.Sequential(
            nn.Linear(coords.point_dim(config.fourier), pixel_width),
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
        return [*self.cross_blocks]

    def spread_latents(self, latents: Tensor, cells: Tensor) -> Tensor:
        """Make what points attend to: latents [B, M, L] at cells [1, M, 4] → kv [B, M, D].

        Once per image, however many points are rendered.
        """
        place = coords.fourier_features(cells, self.config.fourier)
        place = place.expand(latents.shape[0], -1, -1)
        return self.latent_in(torch.cat([latents, place], dim=-1))

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
        grid: Size,
        contexts: list[Context] | None = None,
    ) -> Tensor:
        """Decode points of images.

        kv [B, M, D] of spread_latents at cells [B or 1, M, 4], points [B or 1, P, 4] → colours
        [B, P, C]. ``contexts``, those of all blocks, are what blocks would make of kv.
        """
        x = self.point_in(coords.point_features(points, grid, self.config.fourier))
        x = x.expand(kv.shape[0], -1, -1)
        cell_places, point_places = coords.in_cells(cells, grid), coords.in_cells(points, grid)
        for number, block in enumerate(self.cross_blocks):
            context = contexts[number] if contexts else kv
            x = block(x, context, point_places, cell_places)
        return self.to_colour(x).float()

    def points_per_pixel(self, grid: Size, size: Size) -> Size:
        """Say of how many points, down and across, a pixel of an image (H, W) is the mean.

        Training showed images at their own size. Where a picture is drawn so small that its pixels
        are larger than theirs, one point in each would alias; so each pixel is the mean of as many
        points as it takes for none to stand for a larger area than in training.
        """
        # The grid was rounded to whole cells, so an image was at least (cells − ½)·downsample high.
        down, across = (
            max(1, math.ceil((cells - 0.5) * self.config.downsample / side))
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
        flat = rearrange(latents, "b l h w -> b (h w) l")
        images = self._render(flat, grid, size, part)
        linear = self.decode_linearly(flat, grid)
        if linear is not None:
            images = images + resample(linear, size, part)
        if advance:
            advance(math.prod(side.stop - side.start for side in part))
        return images

    def _render(self, latents: Tensor, grid: Size, size: Size, part: Part) -> Tensor:
        """Render a part of an image, in bands of rows where pixels are means of points."""
        cells = coords.grid_coordinates(grid, device=latents.device).unsqueeze(0)
        kv = self.spread_latents(latents, cells)
        contexts = self._contexts(kv, coords.in_cells(cells, grid))

        def draw(size: Size, part: Part) -> Tensor:
            points = coords.grid_coordinates(size, grid, kv.device, part).unsqueeze(0)
            most = _CHUNK * (_GPU_FACTOR if as_on_gpu(kv.device) else 1)
            chunks = points.split(max(1, most // len(kv)), dim=1)
            colours = [self.decode_points(kv, cells, chunk, grid, contexts) for chunk in chunks]
            height = part[0].stop - part[0].start
            return rearrange(torch.cat(colours, dim=1), "b (h w) c -> b c h w", h=height)

        down, across = points = self.points_per_pixel(grid, size)
        if points == (1, 1):
            return draw(size, part)
        rows, columns = part
        fine = (size[0] * down, size[1] * across)
        wide = slice(columns.start * across, columns.stop * across)
        band = max(1, _BAND // (len(kv) * down * (wide.stop - wide.start)))
        bands = []
        for y in range(rows.start, rows.stop, band):
            high = slice(y * down, min(y + band, rows.stop) * down)
            bands.append(F.avg_pool2d(draw(fine, (high, wide)), points))
        return torch.cat(bands, dim=2)

    def _contexts(self, kv: Tensor, places: Tensor) -> list[Context]:
        """Make what all points attend to, once: kv [B, M, D] at places [1, M, 2] in cells."""
        contexts = []
        for block in self.cross_blocks:
            assert isinstance(block, CrossBlock)
            contexts.append(block.context(kv, places))
        return contexts
