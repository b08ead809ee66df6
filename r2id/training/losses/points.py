"""The loss of an RIAE by attention: a module from a batch to (loss, figures by name).

Every random draw is keyed by (seed, step, sample), so that the loss depends neither on the batch
that a sample is in nor on how often training was interrupted.

To add a pixel loss, see r2id.training.losses.pixel. To add a term, add its weight to LossConfig in
r2id/config/losses.py and a method like _texture_loss here.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid · N pixels
that the encoder sees · M = h·w latents · P points that the decoder renders · D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn

from r2id import rng
from r2id.config import LossConfig
from r2id.models import coords
from r2id.models.coords import Size
from r2id.models.riae import RIAE
from r2id.models.rows import gather_rows, inverted
from r2id.training.losses.pixel import reconstruction_loss
from r2id.training.losses.streams import Stream

_STREAMS = (*map(Stream, range(6)), Stream.DIRECTION)
"""Those that have a key for each sample; the others are drawn once per step."""

Asked = TypeVar("Asked")


def _drawn(
    draw: Callable[[Tensor, Sequence[Asked]], list[Tensor]],
    keys: Mapping[Stream, Tensor],
    asked: Mapping[Stream, Asked | None],
) -> dict[Stream, Tensor]:
    """Draw for several streams at once what is asked of each, but for those of which it is None."""
    some = {stream: wanted for stream, wanted in asked.items() if wanted is not None}
    if not some:
        return {}
    streams = torch.stack([keys[stream] for stream in some], dim=-1)
    return dict(zip(some, draw(streams, list(some.values())), strict=True))


@dataclass(frozen=True)
class _Chosen:
    """Pixels of a training step, and what is drawn for them from the standard normal."""

    encoder: Tensor
    """Pixels that the encoder sees, int64 [B, N]."""
    decoder: Tensor
    """Pixels that the decoder renders, int64 [B, P]."""
    latents: Tensor | None
    """Latents that the decoder sees, int64 [B, M']; None: all."""
    encoder_jitter: Tensor | None
    """[B, N, 2]; None without jitter, as below."""
    decoder_jitter: Tensor | None
    """[B, P, 2]."""
    latent_noise: Tensor | None
    """[B, M, L]."""


@dataclass(frozen=True)
class _Points:
    """Points that the decoder renders, and the latents that it sees."""

    kv: Tensor
    """What points attend to, [B, M, D]."""
    cells: Tensor
    """Coordinates of kv, [B or 1, M, 4]."""
    coordinates: Tensor
    """Coordinates of the points, [B, P, 4]."""
    colours: Tensor
    """True colours of the points, [B, P, C]."""
    linear: Tensor | None
    """What the linear map decodes, [B, C, …]; None: there is none."""


class PointLoss(nn.Module):
    """Error of reconstructing some points of an image from the pixels that the encoder sees.

    The encoder sees a random cloud of pixels; the decoder renders random points, and sees all
    latents or a random cloud of them.
    """

    def __init__(self, model: RIAE, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """image [B, C, H, W] in [−1, 1], index [B] of the samples → scalar loss, figures.

        ``index`` numbers samples, to key their random draws; see image_loader's "draw".
        """
        config, size = self.config, (image.shape[2], image.shape[3])
        keys = self._keys(step, index, image.device)
        grid = self.model.grid_for(size)
        cells = coords.grid_coordinates(grid, device=image.device).unsqueeze(0)
        chosen = self._choose(size, grid, keys)
        latents = self._encode(image, cells, grid, chosen)
        latents = latents + self.model.parts.encoder.encode_linearly(image, grid)
        if chosen.latent_noise is not None:
            latents = latents + config.latent_noise * chosen.latent_noise
        kv = self.model.parts.decoder.spread_latents(latents, cells)
        linear = self.model.parts.decoder.decode_linearly(latents, grid)
        points = self._choose_points(kv, cells, grid, image, chosen, linear)
        decoded = self._decode(points, points.coordinates, grid)
        loss = reconstruction_loss(decoded, points.colours, config.pixel)
        if config.texture:
            texture = self._texture_loss(points, decoded, grid, image, keys)
            loss = loss + config.texture * texture
        return loss, {
            "mse": reconstruction_loss(decoded.detach(), points.colours, "mse"),
            "latent_rms": latents.detach().square().mean().sqrt(),
        }

    def _keys(self, step: int, index: Tensor, device: torch.device) -> dict[Stream, Tensor]:
        """Make the keys of all streams on the CPU, and send them at once: int64 [B] each."""
        keys = rng.fold(self.seed, step, index)
        folded = torch.stack([rng.fold(keys, stream) for stream in _STREAMS])
        return dict(zip(_STREAMS, folded.to(device, non_blocking=True).unbind(), strict=True))

    def _choose(self, size: Size, grid: Size, keys: Mapping[Stream, Tensor]) -> _Chosen:
        """Draw all subsets and all noise for images of a size (H, W)."""
        config, pixels, cells = self.config, size[0] * size[1], grid[0] * grid[1]
        shown = max(1, round(config.encode_cloud * pixels))
        rendered = min(pixels, config.decode_pixels)
        clouded, jittered = config.decode_cloud < 1, bool(config.jitter)
        subsets = _drawn(
            rng.subsets,
            keys,
            {
                Stream.ENCODER_PIXELS: (pixels, shown),
                Stream.DECODER_PIXELS: (pixels, rendered),
                Stream.LATENT_CLOUD: (cells, max(1, round(cells * config.decode_cloud)))
                if clouded
                else None,
            },
        )
        noise = _drawn(
            rng.normals,
            keys,
            {
                Stream.ENCODER_JITTER: (shown, 2) if jittered else None,
                Stream.DECODER_JITTER: (rendered, 2) if jittered else None,
                Stream.LATENT_NOISE: (cells, self.model.config.latent_channels)
                if config.latent_noise
                else None,
            },
        )
        return _Chosen(
            subsets[Stream.ENCODER_PIXELS],
            subsets[Stream.DECODER_PIXELS],
            subsets.get(Stream.LATENT_CLOUD),
            *map(noise.get, (Stream.ENCODER_JITTER, Stream.DECODER_JITTER, Stream.LATENT_NOISE)),
        )

    def _encode(self, image: Tensor, cells: Tensor, grid: Size, chosen: _Chosen) -> Tensor:
        """Encode the pixels that the encoder may see: [B, M, L]."""
        coordinates, colours = self._points(image, grid, chosen.encoder, chosen.encoder_jitter)
        return self.model.parts.encoder.encode_points(colours, coordinates, cells, grid)

    def _choose_points(
        self,
        kv: Tensor,
        cells: Tensor,
        grid: Size,
        image: Tensor,
        chosen: _Chosen,
        linear: Tensor | None,
    ) -> _Points:
        """Take the points of the image, and the latents that the decoder may see."""
        coordinates, truth = self._points(image, grid, chosen.decoder, chosen.decoder_jitter)
        if chosen.latents is not None:
            kv = gather_rows(kv, chosen.latents, inverted(chosen.latents, kv.shape[1]))
            cells = cells[0][chosen.latents]
        return _Points(kv, cells, coordinates, truth, linear)

    def _decode(self, points: _Points, coordinates: Tensor, grid: Size) -> Tensor:
        decoded = self.model.parts.decoder.decode_points(points.kv, points.cells, coordinates, grid)
        if points.linear is None:
            return decoded
        return decoded + coords.sample_image(points.linear, coordinates)

    def _texture_loss(
        self,
        points: _Points,
        decoded: Tensor,
        grid: Size,
        image: Tensor,
        keys: Mapping[Stream, Tensor],
    ) -> Tensor:
        """Loss of the differences between each point and another one, one pixel away from it."""
        angle = (2 * math.pi) * rng.uniform(keys[Stream.DIRECTION], points.coordinates.shape[1])
        # displace counts in halves of a pixel, so 2 is a whole one.
        beside = coords.displace(
            points.coordinates,
            2 * torch.stack([angle.cos(), angle.sin()], dim=-1),
            (image.shape[2], image.shape[3]),
            grid,
        )
        change = self._decode(points, beside, grid) - decoded
        true_change = coords.sample_image(image, beside) - points.colours
        return reconstruction_loss(change, true_change, self.config.pixel)

    def _points(
        self, image: Tensor, shape: Size, chosen: Tensor, jitter: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Move the chosen pixels [B, P] by normal noise [B, P, 2], if there is any.

        Returns coordinates [B, P, 4] and colours [B, P, C].

        A jittered point has the bicubic colour of its own place, not that of its pixel, because
        then the same place would be shown with several colours and the model would learn their
        blurred mean.
        """
        size: Size = (image.shape[2], image.shape[3])
        coordinates = coords.grid_coordinates(size, shape, image.device)[chosen]
        if jitter is None:
            flat = rearrange(image, "b c h w -> b (h w) c")
            return coordinates, flat.gather(1, chosen.unsqueeze(-1).expand(-1, -1, flat.shape[-1]))
        coordinates = coords.displace(coordinates, self.config.jitter * jitter, size, shape)
        return coordinates, coords.sample_image(image, coordinates)
