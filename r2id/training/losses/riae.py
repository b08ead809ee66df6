"""What RIAE minimises: a module from a batch to (loss, named figures).

Every random draw is keyed by (seed, step, sample), so that a loss depends on neither the batch that
a sample is in nor on how often training was interrupted.

To add a pixel loss, see r2id.training.losses.pixel. To add a term, add its weight to LossConfig in
r2id/config/losses.py and a method like _texture_loss here.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid · N pixels
seen · M = h·w latents · P points asked for · D width.
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
_ENCODER_PIXELS, _ENCODER_JITTER, _DECODER_PIXELS, _DECODER_JITTER, _LATENT_NOISE, _LATENT_CLOUD = (
    range(6)
)
_DECODE_SCALE, _ENCODE_SCALE, _DIRECTION = 10, 12, 13  # the numbers between are R2ID's

_FACTORS = 8  # that a side may be scaled by

Figures = dict[str, Tensor]


@dataclass(frozen=True)
class _Points:
    """Points that the decoder is asked for, and what it sees."""

    kv: Tensor
    """[B, M, D]."""
    cells: Tensor
    """Their places, [B or 1, M, 4]."""
    coordinates: Tensor
    """The points' places, [B, P, 4]."""
    colours: Tensor
    """The true ones, [B, P, C]."""
    size: Size
    """Of the image that they are of."""
    tiles: Tiles | None
    weight: Tensor | None
    """[B, P, 1], of their errors."""


class RiaeLoss(nn.Module):
    """Reconstruction of some points of an image from what a training step shows of it.

    Which ones is for the model's visibility to choose: a random cloud of pixels seen and random
    points asked for, or all pixels seen and random tiles asked for. A jittered point stays with the
    tile of its pixel: half a pixel is little beside the halo.
    """

    def __init__(self, model: RIAE, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, Figures]:
        """image [B, C, H, W] in [−1, 1], index [B] of the samples → scalar loss, figures."""
        config, size = self.config, (image.shape[2], image.shape[3])
        rng_keys = rng.fold(self.seed, step, index)
        grid = self.model.grid_for(size)
        cells = coords.grid_coordinates(grid, device=image.device).unsqueeze(0)
        seen = rescaled(image, config.encode_scales, self.seed, step, _ENCODE_SCALE)
        asked = rescaled(image, self.model.config.decode_scales, self.seed, step, _DECODE_SCALE)
        count = max(1, round(config.encode_cloud * size[0] * size[1]))
        latents = self._encode(seen, count, cells, grid, rng_keys)
        if config.latent_noise:
            noise = rng.normal(rng.fold(rng_keys, _LATENT_NOISE), *latents.shape[1:])
            latents = latents + config.latent_noise * noise
        kv = self.model.spread_latents(latents, cells, grid)
        points = self._choose_points(kv, cells, grid, asked, rng_keys)
        decoded = self._decode(points, points.coordinates, grid)
        loss = reconstruction_loss(decoded, points.colours, config.pixel, points.weight)
        if config.texture:
            texture = self._texture_loss(points, decoded, grid, asked, rng_keys)
            loss = loss + config.texture * texture
        return loss, {
            "mse": reconstruction_loss(decoded.detach(), points.colours, "mse", points.weight),
            "latent_rms": latents.detach().square().mean().sqrt(),
        }

    def _encode(
        self, image: Tensor, count: int, cells: Tensor, grid: Size, rng_keys: Tensor
    ) -> Tensor:
        """Latents [B, M, L] from the pixels that the encoder is shown, about ``count`` of them."""
        size: Size = (image.shape[2], image.shape[3])
        visibility = self.model.visibility
        chosen = visibility.choose_encoder_pixels(
            rng.fold(rng_keys, _ENCODER_PIXELS), size[0] * size[1], count
        )
        coordinates, colours = self._points(
            image, grid, chosen, rng.fold(rng_keys, _ENCODER_JITTER)
        )
        tiles = visibility.tiles(grid, size, grid, device=image.device)
        return self.model.encode_points(colours, coordinates, size, cells, grid, tiles)

    def _choose_points(
        self, kv: Tensor, cells: Tensor, grid: Size, image: Tensor, rng_keys: Tensor
    ) -> _Points:
        """Points of the image, and the latents that the decoder is shown for them."""
        size: Size = (image.shape[2], image.shape[3])
        visibility = self.model.visibility
        asked = visibility.choose_decoder_pixels(
            rng.fold(rng_keys, _DECODER_PIXELS), size, grid, self.config.decode_pixels
        )
        coordinates, truth = self._points(
            image, grid, asked.pixels, rng.fold(rng_keys, _DECODER_JITTER)
        )
        kv, cells = visibility.choose_decoder_latents(
            rng.fold(rng_keys, _LATENT_CLOUD), kv, cells, self.config.decode_cloud
        )
        return _Points(kv, cells, coordinates, truth, size, asked.tiles, asked.weight)

    def _decode(self, points: _Points, coordinates: Tensor, grid: Size) -> Tensor:
        return self.model.decode_points(
            points.kv, points.cells, coordinates, points.size, grid, points.tiles
        )

    def _texture_loss(
        self, points: _Points, decoded: Tensor, grid: Size, image: Tensor, rng_keys: Tensor
    ) -> Tensor:
        """The error of the differences between points and others one pixel away from them."""
        angle = (2 * math.pi) * rng.uniform(
            rng.fold(rng_keys, _DIRECTION), points.coordinates.shape[1]
        )
        # Displacements are in halves of a pixel, so 2 is a whole one.
        beside = coords.displace(
            points.coordinates,
            2 * torch.stack([angle.cos(), angle.sin()], dim=-1),
            points.size,
            grid,
        )
        change = self._decode(points, beside, grid) - decoded
        true_change = coords.sample_image(image, beside) - points.colours
        return reconstruction_loss(change, true_change, self.config.pixel, points.weight)

    def _points(
        self, image: Tensor, shape: Size, chosen: Tensor, jitter_keys: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw points near an image's chosen pixels, and look up the colours there.

        int64 [B, P] → [B, P, 4] and [B, P, C].

        Jittered points lie between pixel centres and take the bicubic colour of their place, not
        the pixel's: jitter without that would teach a blurred image.
        """
        size: Size = (image.shape[2], image.shape[3])
        jitter = self.config.jitter
        coordinates = coords.grid_coordinates(size, shape, image.device)[chosen]
        if not jitter:
            flat = rearrange(image, "b c h w -> b (h w) c")
            return coordinates, flat.gather(1, chosen.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        coordinates = coords.displace(
            coordinates, jitter * rng.normal(jitter_keys, chosen.shape[1], 2), size, shape
        )
        return coordinates, coords.sample_image(image, coordinates)


def rescaled(image: Tensor, scales: tuple[float, float] | None, *key: int) -> Tensor:
    """Resize images [B, C, H, W] to a random height and width within factors of their own.

    Bicubic, averaged where they shrink. The factors are a few, evenly spread by their logarithm:
    kernels are prepared, and kept, for every shape, on a CPU a gigabyte of them for a thousand.
    """
    if scales is None:
        return image
    places = (int(_FACTORS * rng.number(*key, axis)) / (_FACTORS - 1) for axis in range(2))
    height, width = (
        max(1, round(side * scales[0] * (scales[1] / scales[0]) ** place))
        for side, place in zip(image.shape[2:], places, strict=True)
    )
    return resize(image, (height, width))
