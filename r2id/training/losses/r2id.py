"""The loss of R2ID: a module from a batch to (loss, figures by name).

Every random draw is keyed by (seed, step, sample), so that the loss depends neither on the batch
that a sample is in nor on how often training was interrupted.

Shape letters: B batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2id import rng
from r2id.config import DiffusionConfig
from r2id.diffusion.denoising import denoising_loss, draw_times, noise_levels
from r2id.models import coords
from r2id.models.conditioning import drop
from r2id.models.coords import Size
from r2id.models.r2id import R2ID
from r2id.training.losses.streams import Stream

_QUARTERS = 4


class R2idLoss(nn.Module):
    """Error of denoising normalised latents at random times, with a share of conditions dropped."""

    def __init__(
        self, model: R2ID, diffusion: DiffusionConfig, base_side: float, seed: int
    ) -> None:
        super().__init__()
        self.model, self.diffusion, self.base_side, self.seed = model, diffusion, base_side, seed

    def forward(
        self, latent: Tensor, condition: Tensor, index: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Normalised latent [B, L, h, w], condition [B, …], index [B] of samples → scalar, figures.

        ``index`` numbers samples, to key their random draws; see image_loader's "draw". On the CPU
        it stays there, and with it all that is drawn once per sample.
        """
        return self.evaluate(**self.draw(latent, condition, index, step))

    def draw(
        self, latent: Tensor, condition: Tensor, index: Tensor, step: int
    ) -> dict[str, Tensor]:
        """Draw all random numbers of ``forward`` → arguments of ``evaluate``."""
        rng_keys = rng.fold(self.seed, step, index)
        grid: Size = (latent.shape[2], latent.shape[3])
        chance = rng.uniform(rng.fold(rng_keys, Stream.DROP), 1).squeeze(-1)
        dropped = chance < self.diffusion.condition_dropout
        times = draw_times(rng.fold(rng_keys, Stream.TIME), self.diffusion.time_sampling)
        side = (grid[0] * grid[1]) ** 0.5
        levels = noise_levels(self.diffusion, self.base_side, side, times)
        noise, coordinates = self._draw(rng_keys, latent, grid)
        # All numbers per sample go to the device in one copy.
        per_sample = torch.cat([levels, time_quarters(times)]).to(latent.device, non_blocking=True)
        drawn = {
            "latent": latent,
            "condition": drop(condition, dropped.to(condition.device, non_blocking=True)),
            "noise": noise,
            "coordinates": coordinates,
            "levels": per_sample[: len(levels)],
            "within": per_sample[len(levels) :],
        }
        if "cloud" in self.model.config.attention:
            drawn["cloud_key"] = rng.fold(self.seed, step, Stream.CLOUDS)
        return drawn

    def evaluate(
        self, within: Tensor, levels: Tensor, **drawn: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of what was drawn → scalar, figures.

        It depends on nothing but its arguments, the weights and torch's generator (dropout).
        """
        losses, unweighted = denoising_loss(self.model, self.diffusion, levels, **drawn)
        unweighted = unweighted.detach()
        return losses.mean(), {"denoising_mse": unweighted.mean(), **by_time(unweighted, within)}

    def _draw(self, rng_keys: Tensor, latent: Tensor, grid: Size) -> tuple[Tensor, Tensor]:
        """Draw noise in the shape of the latent, and the places of its cells [B or 1, N, 4]."""
        shape, jitter = tuple(latent.shape[1:]), self.model.config.jitter
        coordinates = coords.grid_coordinates(grid, device=latent.device)
        streams = {Stream.NOISE: shape, Stream.JITTER: (len(coordinates), 2)}
        if not jitter:
            del streams[Stream.JITTER]
        keys = torch.stack([rng.fold(rng_keys, stream) for stream in streams], dim=-1)
        noise, *moves = rng.normals(keys, list(streams.values()), latent.device)
        if moves:
            coordinates = coords.displace(coordinates, jitter * moves[0], grid)
        return noise, coordinates


def time_quarters(times: Tensor) -> Tensor:
    """Tell which quarter of (0, 1) each of the times [B] is in: 0 or 1, float32 [4, B].

    Time 0 is an image, time 1 is noise.
    """
    number = (times * _QUARTERS).floor().clamp(max=_QUARTERS - 1)
    return (number == torch.arange(_QUARTERS, device=times.device).unsqueeze(1)).float()


def by_time(errors: Tensor, within: Tensor) -> dict[str, Tensor]:
    """Sum errors [B] within each of the ``time_quarters`` [4, B] → figures [2]: sum, number."""
    sums = torch.stack([(errors * within).sum(1), within.sum(1)], dim=1)
    return {
        f"loss_by_time/{quarter / _QUARTERS:.2f}-{(quarter + 1) / _QUARTERS:.2f}": both
        for quarter, both in enumerate(sums.unbind(0))
    }
