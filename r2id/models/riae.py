"""RIAE: an autoencoder that sees points with coordinates instead of a pixel grid.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels · N pixels seen · M = h·w latents
· P points asked for · D width.

Encoding: a latent grid of any size starts as coordinates only and queries the image's pixels. Decoding: points anywhere,
a pixel grid of any size among them, start as coordinates only and query the latents. The latent grid owns the picture's
aspect ratio: relative coordinates of cells and points alike take its shape, so that decoding 7×7 latents at 42×28 renders
a square picture stretched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.models import coords, pretrained
from r2id.models.attention import RMSNorm
from r2id.models.coords import Size
from r2id.models.layers import CrossBlock, SelfBlock, zero_linear

_ENCODE_CHUNK = 1 << 19  # pixels encoded at once outside training, one image at least: memory does not grow with the batch
_DECODE_CHUNK = 8192  # points decoded at once outside training: memory does not grow with the output


class RIAE(nn.Module):
    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        features = coords.fourier_dim(config.fourier)
        pixel_heads = max(1, config.heads * config.pixel_width // config.width)

        def latent_stack() -> nn.ModuleList:
            return nn.ModuleList(SelfBlock(config.width, config.heads, config.ffn_ratio, config.locality)
                                 for _ in range(config.latent_blocks))

        self.pixel_in = nn.Sequential(nn.Linear(channels + features + 8, config.pixel_width), nn.SiLU(),
                                      nn.Linear(config.pixel_width, config.pixel_width))
        self.cell_in = nn.Linear(features, config.width)
        self.encoder = nn.ModuleList(
            CrossBlock(config.width, config.pixel_width, config.heads, config.ffn_ratio, config.locality)
            for _ in range(config.encoder_blocks))
        self.encoder_latent = latent_stack()
        self.to_latent = nn.Sequential(RMSNorm(config.width), nn.Linear(config.width, config.latent_channels))

        self.latent_in = nn.Linear(config.latent_channels + features, config.width)
        self.decoder_latent = latent_stack()
        self.point_in = nn.Sequential(nn.Linear(features + 8, config.pixel_width), nn.SiLU(),
                                      nn.Linear(config.pixel_width, config.pixel_width))
        self.decoder = nn.ModuleList(
            CrossBlock(config.pixel_width, config.width, pixel_heads, config.ffn_ratio, config.locality)
            for _ in range(config.decoder_blocks))
        self.to_colour = nn.Sequential(RMSNorm(config.pixel_width), zero_linear(config.pixel_width, channels))

    @classmethod
    def from_pretrained(cls, path: str | Path) -> RIAE:
        """A trained model from a file that ``r2id checkpoint export`` wrote: float32, on the CPU, ready for inference.

        InputError when the file is none, is damaged or holds another model. r2id.models.pretrained.read also gives what
        else the file says, the latents' statistics among it.
        """
        found = pretrained.read(Path(path), "riae")
        return found.fill(cls(found.section("riae", RiaeConfig), found.facts["channels"]))

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [*self.encoder, *self.encoder_latent, *self.decoder_latent, *self.decoder]

    def grid_for(self, image: Size) -> Size:
        """Latent grid (h, w) of an image (H, W): one cell per ``config.cell`` pixels, at least one."""
        height, width = (max(1, round(side / self.config.cell)) for side in image)
        return height, width

    def encode_points(self, colours: Tensor, at: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Colours [B, N, C] at [B or 1, N, 4], seen from latent cells [1, M, 4] of a grid (h, w) → latents [B, M, L]."""
        batch = colours.shape[0]
        place = torch.cat([self._features(at), coords.cell_phase(at, grid)], dim=-1)
        pixels = self.pixel_in(torch.cat([colours, place.expand(batch, -1, -1)], dim=-1))
        x = self.cell_in(self._features(cells)).expand(batch, -1, -1)
        cell_places, pixel_places = _in_cells(cells, grid), _in_cells(at, grid)
        for block in self.encoder:
            x = block(x, pixels, cell_places, pixel_places)
        for block in self.encoder_latent:
            x = block(x, cell_places)
        latents = self.to_latent(x).float()
        return torch.tanh(latents) if self.config.bounded else latents

    def spread_latents(self, latents: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Latents [B, M, L] at cells [1, M, 4] → the decoder's keys [B, M, D]; once per image, however many points."""
        place = self._features(cells).expand(latents.shape[0], -1, -1)
        x = self.latent_in(torch.cat([latents, place], dim=-1))
        cell_places = _in_cells(cells, grid)
        for block in self.decoder_latent:
            x = block(x, cell_places)
        return x

    def decode_points(self, keys: Tensor, cells: Tensor, at: Tensor, grid: Size) -> Tensor:
        """Keys [B, M, D] of spread_latents at cells [B or 1, M, 4], asked at points [B or 1, P, 4] → colours [B, P, C]."""
        x = self.point_in(torch.cat([self._features(at), coords.cell_phase(at, grid)], dim=-1))
        x = x.expand(keys.shape[0], -1, -1)
        cell_places, point_places = _in_cells(cells, grid), _in_cells(at, grid)
        for block in self.decoder:
            x = block(x, keys, point_places, cell_places)
        return self.to_colour(x).float()

    @torch.no_grad()
    def encode(self, image: Tensor, grid: Size | None = None) -> Tensor:
        """Image [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w] from all of its pixels, on any grid."""
        size: Size = (image.shape[2], image.shape[3])
        grid = grid or self.grid_for(size)
        at = coords.grid_coordinates(size, grid, image.device).unsqueeze(0)
        cells = coords.grid_coordinates(grid, device=image.device).unsqueeze(0)
        colours = rearrange(image, "b c h w -> b (h w) c")
        latents = torch.cat([self.encode_points(part, at, cells, grid)
                             for part in colours.split(max(1, _ENCODE_CHUNK // at.shape[1]))])
        return rearrange(latents, "b (h w) l -> b l h w", h=grid[0])

    @torch.no_grad()
    def decode(self, latents: Tensor, size: Size) -> Tensor:
        """Raw latents [B, L, h, w] → image [B, C, H, W] of any size, nominally in [−1, 1] (not clipped)."""
        grid: Size = (latents.shape[2], latents.shape[3])
        cells = coords.grid_coordinates(grid, device=latents.device).unsqueeze(0)
        keys = self.spread_latents(rearrange(latents, "b l h w -> b (h w) l"), cells, grid)
        at = coords.grid_coordinates(size, grid, latents.device).unsqueeze(0)
        colours = torch.cat([self.decode_points(keys, cells, part, grid)
                             for part in at.split(max(1, _DECODE_CHUNK // latents.shape[0]), dim=1)], dim=1)
        return rearrange(colours, "b (h w) c -> b c h w", h=size[0])

    def _features(self, at: Tensor) -> Tensor:
        return coords.fourier_features(at, self.config.fourier)


def _in_cells(at: Tensor, grid: Size) -> Tensor:
    """Absolute coordinates in units of latent cells, from the image's centre: [..., 4] → [..., 2]."""
    return at[..., :2] * torch.tensor([grid[1], grid[0]], dtype=torch.float32, device=at.device)
