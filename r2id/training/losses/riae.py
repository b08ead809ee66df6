"""What RIAE minimises: a module from a batch to (loss, named figures), with every random draw keyed by (seed, step,
sample).

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid · N, P points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from r2id import rng
from r2id.config import LossConfig
from r2id.images import resize
from r2id.models import coords
from r2id.models.coords import Size
from r2id.models.riae import RIAE
from r2id.models.tiles import Tiles
from r2id.training.losses.pixel import reconstruction_loss

# One stream of random numbers for each purpose.
_SEEN, _SEEN_JITTER, _ASKED, _ASKED_JITTER, _LATENT_NOISE, _LATENT_CLOUD = range(6)
_DECODE_SCALE, _ENCODE_SCALE, _DIRECTION = 10, 12, 13  # the numbers between are R2ID's

_FACTORS = 8  # that a side may be scaled by

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class _Points:
    """Points that the decoder is asked for, and what it sees."""

    keys: Tensor
    cells: Tensor
    at: Tensor
    """[B, P, 4]."""
    colours: Tensor
    """The true ones, [B, P, C]."""
    size: Size
    """Of the image that they are of."""
    tiles: Tiles | None = None
    weight: Tensor | None = None


class RiaeLoss(nn.Module):
    """Reconstruction of random points of an image from a random cloud of its points; with ``tiled`` attention, of random
    tiles of it from all of its pixels.

    A jittered point stays with the tile of its pixel: half a pixel is little beside the halo.
    """

    def __init__(self, model: RIAE, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, Figures]:
        """image [B, C, H, W] in [−1, 1], index [B] of the samples → scalar loss, figures."""
        config, size = self.config, (image.shape[2], image.shape[3])
        keys = rng.fold(self.seed, step, index)
        grid = self.model.grid_for(size)
        cells = coords.grid_coordinates(grid, device=image.device).unsqueeze(0)
        seen = rescaled(image, config.encode_scales, self.seed, step, _ENCODE_SCALE)
        asked = rescaled(image, self.model.config.decode_scales, self.seed, step, _DECODE_SCALE)
        latents = self._encode(
            seen, max(1, round(config.encode_cloud * size[0] * size[1])), cells, grid, keys
        )
        if config.latent_noise:
            noise = rng.normal(rng.fold(keys, _LATENT_NOISE), *latents.shape[1:])
            latents = latents + config.latent_noise * noise
        latent_keys = self.model.spread_latents(latents, cells, grid)
        ask = self._ask_tiles if self.model.tiled else self._ask_cloud
        points = ask(latent_keys, cells, grid, asked, keys)
        decoded = self._decode(points, points.at, grid)
        loss = reconstruction_loss(decoded, points.colours, config.pixel, points.weight)
        if config.texture:
            loss = loss + config.texture * self._texture_loss(points, decoded, grid, asked, keys)
        return loss, {
            "mse": reconstruction_loss(decoded.detach(), points.colours, "mse", points.weight),
            "latent_rms": latents.detach().square().mean().sqrt(),
        }

    def _decode(self, points: _Points, at: Tensor, grid: Size) -> Tensor:
        return self.model.decode_points(
            points.keys, points.cells, at, points.size, grid, points.tiles
        )

    def _texture_loss(
        self, points: _Points, decoded: Tensor, grid: Size, image: Tensor, keys: Tensor
    ) -> Tensor:
        """The error of the differences between points and others one pixel away from them."""
        angle = (2 * math.pi) * rng.uniform(rng.fold(keys, _DIRECTION), points.at.shape[1])
        beside = coords.displace(
            points.at, 2 * torch.stack([angle.cos(), angle.sin()], dim=-1), points.size, grid
        )
        change = self._decode(points, beside, grid) - decoded
        true_change = coords.sample_image(image, beside) - points.colours
        return reconstruction_loss(change, true_change, self.config.pixel, points.weight)

    def _encode(self, image: Tensor, count: int, cells: Tensor, grid: Size, keys: Tensor) -> Tensor:
        """From random pixels, as many as there are at most, or with ``tiled`` attention from all: latents [B, M, L]."""
        size: Size = (image.shape[2], image.shape[3])
        pixels = size[0] * size[1]
        if self.model.tiled:
            chosen = torch.arange(pixels, device=image.device).expand(len(image), -1)
        else:
            chosen = rng.subset(rng.fold(keys, _SEEN), pixels, min(count, pixels))
        at, colours = self._points(image, grid, chosen, rng.fold(keys, _SEEN_JITTER))
        tiles = self.model.tiles(grid, size, grid, device=image.device)
        return self.model.encode_points(colours, at, size, cells, grid, tiles)

    def _ask_cloud(
        self, latent_keys: Tensor, cells: Tensor, grid: Size, image: Tensor, keys: Tensor
    ) -> _Points:
        """Random points of the image."""
        size: Size = (image.shape[2], image.shape[3])
        pixels = size[0] * size[1]
        chosen = rng.subset(rng.fold(keys, _ASKED), pixels, min(self.config.decode_pixels, pixels))
        at, truth = self._points(image, grid, chosen, rng.fold(keys, _ASKED_JITTER))
        if self.config.decode_cloud < 1:
            latent_keys, cells = self._cloud(latent_keys, cells, keys)
        return _Points(latent_keys, cells, at, truth, size)

    def _ask_tiles(
        self, latent_keys: Tensor, cells: Tensor, grid: Size, image: Tensor, keys: Tensor
    ) -> _Points:
        """Random tiles of the image, with the weights [B, P, 1] with which their mean error is, on average, the mean over
        the whole image; surplus points have none."""
        size: Size = (image.shape[2], image.shape[3])
        tiles = self.model.tiles(size, grid, grid, device=image.device)
        assert tiles is not None
        total, pixels = tiles.queries.shape[1], size[0] * size[1]
        count = min(total, max(1, round(self.config.decode_pixels * total / pixels)))
        tiles = tiles.chosen(rng.subset(rng.fold(keys, _ASKED), total, count))
        at, truth = self._points(
            image, grid, tiles.queries.flatten(1), rng.fold(keys, _ASKED_JITTER)
        )
        weight = tiles.asked.flatten(1).unsqueeze(-1) * (total * tiles.queries.shape[2] / pixels)
        return _Points(latent_keys, cells, at, truth, size, tiles, weight)

    def _points(
        self, image: Tensor, shape: Size, chosen: Tensor, jitter_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Points of each image near its chosen pixels, int64 [B, P] → [B, P, 4], and the colours there, [B, P, C].

        Jittered points lie between pixel centres and take the bicubic colour of their place, not the pixel's: jitter
        without that would teach a blurred image.
        """
        size: Size = (image.shape[2], image.shape[3])
        jitter = self.config.jitter
        at = coords.grid_coordinates(size, shape, image.device)[chosen]
        if not jitter:
            flat = rearrange(image, "b c h w -> b (h w) c")
            return at, flat.gather(1, chosen.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        at = coords.displace(at, jitter * rng.normal(jitter_keys, chosen.shape[1], 2), size, shape)
        return at, coords.sample_image(image, at)

    def _cloud(self, latent_keys: Tensor, cells: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """A random share of the decoder's keys [B, M, D] and of their cells."""
        count = max(1, round(latent_keys.shape[1] * self.config.decode_cloud))
        chosen = rng.subset(rng.fold(keys, _LATENT_CLOUD), latent_keys.shape[1], count)
        gathered = latent_keys.gather(1, chosen.unsqueeze(-1).expand(-1, -1, latent_keys.shape[-1]))
        return gathered, cells[0][chosen]


def rescaled(image: Tensor, scales: tuple[float, float] | None, *key: int) -> Tensor:
    """Images [B, C, H, W] at a random height and width within factors of their own, evenly spread by their logarithm:
    bicubic, averaged where they shrink.

    Of a few factors, since kernels are prepared, and kept, for every shape: on a CPU a gigabyte of them for a thousand.
    """
    if scales is None:
        return image
    places = (int(_FACTORS * rng.number(*key, axis)) / (_FACTORS - 1) for axis in range(2))
    height, width = (
        max(1, round(side * scales[0] * (scales[1] / scales[0]) ** place))
        for side, place in zip(image.shape[2:], places, strict=True)
    )
    return resize(image, (height, width))
