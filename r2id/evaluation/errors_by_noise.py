"""Errors of a sampler's model on real latents that are noised to one level.

Shape letters: B samples · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id import rng
from r2id.diffusion import objective, schedule
from r2id.diffusion.denoising import denoising_loss, noise_levels
from r2id.sampling.sampler import Sampler


@torch.no_grad()
def loss_at(
    sampler: Sampler, latents: Tensor, condition: Tensor, time: float, seed: int = 0
) -> Tensor:
    """Compute the unweighted squared error of the prediction at one time in (0, 1), per sample.

    Raw latents [B, L, h, w] and conditions [B, …] → float32 [B].
    """
    side = (latents.shape[2] * latents.shape[3]) ** 0.5
    times = torch.full((len(latents),), time, dtype=torch.float32)
    levels = noise_levels(sampler.diffusion, sampler.base_side, side, times)
    levels = levels.to(latents.device, non_blocking=True)
    data, condition = sampler.codec.normalise(latents), sampler.adapt(condition)
    with sampler.autocast():
        return denoising_loss(
            sampler.model, sampler.diffusion, levels, data, condition, _noise(latents, seed)
        )[1]


@torch.no_grad()
def data_error(
    sampler: Sampler, latents: Tensor, condition: Tensor, log_snr: float, seed: int = 0
) -> Tensor:
    """Compute the squared error of the x₀ that the model predicts at a logSNR, per sample.

    Unlike in training and sampling, the noise level is not shifted with the grid's size.
    Raw latents [B, L, h, w] and conditions [B, …] → float32 [B].
    """
    data, level = sampler.codec.normalise(latents), torch.tensor(log_snr, dtype=torch.float32)
    alpha, sigma = schedule.alpha_sigma(level, sampler.diffusion.schedule)
    x = alpha * data + sigma * _noise(latents, seed)
    times = torch.full((1,), float(schedule.alpha_bar(level)), dtype=torch.float32, device=x.device)
    with sampler.autocast():
        predicted = sampler.model(x, times, sampler.adapt(condition))
    predicted_data, _ = objective.to_data_and_noise(
        sampler.diffusion.objective, x, predicted.float(), alpha, sigma
    )
    return (predicted_data - data).square().flatten(1).mean(1)


def _noise(latents: Tensor, seed: int) -> Tensor:
    keys = rng.fold(seed, torch.arange(len(latents)))
    return rng.normal(keys, *latents.shape[1:], device=latents.device)
