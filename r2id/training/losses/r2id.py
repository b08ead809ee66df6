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
from r2id.diffusion.denoising import denoising_loss, draw_times
from r2id.models import coords
from r2id.models.conditioning import drop
from r2id.models.coords import Size
from r2id.models.r2id import R2ID

# One stream of random numbers for each purpose. Their numbers are those of no stream of RIAE's
# loss, and must stay: with others, a resumed run would not equal an uninterrupted one.
_TIME, _NOISE, _DROP, _JITTER, _CLOUDS = 6, 7, 8, 9, 11
_QUARTERS = 4

Figures = dict[str, Tensor]


class R2idLoss(nn.Module):
    """Error of denoising normalised latents at random times, with a share of conditions dropped."""

    def __init__(
        self, model: R2ID, diffusion: DiffusionConfig, base_side: float, seed: int
    ) -> None:
        super().__init__()
        self.model, self.diffusion, self.base_side, self.seed = model, diffusion, base_side, seed

    def forward(
        self, latent: Tensor, condition: Tensor, index: Tensor, step: int
    ) -> tuple[Tensor, Figures]:
        """Normalised latent [B, L, h, w], condition [B, …], index [B] of samples → scalar, figures.

        ``index`` is a sample's number in the dataset, which keys its random draws.
        """
        rng_keys = rng.fold(self.seed, step, index)
        grid: Size = (latent.shape[2], latent.shape[3])
        dropped = (
            rng.uniform(rng.fold(rng_keys, _DROP), 1).squeeze(-1) < self.diffusion.condition_dropout
        )
        coordinates = coords.grid_coordinates(grid, device=latent.device)
        if self.model.config.jitter:
            noise = rng.normal(rng.fold(rng_keys, _JITTER), len(coordinates), 2)
            coordinates = coords.displace(coordinates, self.model.config.jitter * noise, grid)
        times = draw_times(rng.fold(rng_keys, _TIME), self.diffusion.time_sampling)
        losses, unweighted = denoising_loss(
            self.model,
            self.diffusion,
            self.base_side,
            latent,
            drop(condition, dropped),
            times,
            rng.normal(rng.fold(rng_keys, _NOISE), *latent.shape[1:]),
            coordinates,
            rng.fold(self.seed, step, _CLOUDS).to(latent.device),
        )
        unweighted = unweighted.detach()
        return losses.mean(), {"denoising_mse": unweighted.mean(), **by_time(unweighted, times)}


def by_time(errors: Tensor, times: Tensor) -> Figures:
    """Sum errors [B] within each quarter of the times [B] in (0, 1) → figures [2]: sum, number.

    Time 0 is an image, time 1 is noise.
    """
    quarters = (times * _QUARTERS).floor().clamp(max=_QUARTERS - 1)
    figures = {}
    for quarter in range(_QUARTERS):
        within = (quarters == quarter).to(errors.dtype)
        begin, end = quarter / _QUARTERS, (quarter + 1) / _QUARTERS
        figures[f"loss_by_time/{begin:.2f}-{end:.2f}"] = torch.stack(
            [(errors * within).sum(), within.sum()]
        )
    return figures
