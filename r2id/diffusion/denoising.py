"""The error of a denoising prediction, and the times at which it is measured.

Shape letters: B batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id import rng
from r2id.config import DiffusionConfig
from r2id.diffusion import objective, schedule


def draw_times(rng_keys: Tensor, sampling: str) -> Tensor:
    """Draw a time in (0, 1) per key: uniform, or logit-normal (Esser et al. 2024, eq. 19)."""
    if sampling == "uniform":
        return rng.uniform(rng_keys, 1).squeeze(-1)
    return torch.sigmoid(rng.normal(rng_keys, 1).squeeze(-1))


def noise_levels(diffusion: DiffusionConfig, base_side: float, side: float, time: Tensor) -> Tensor:
    """Return what times in (0, 1) amount to on a grid of a side √(h·w): [B] → [4, B].

    The rows are α, σ, the share of signal in the variance ᾱ, and the weight of the squared error.
    ``base_side`` is the side of the grid whose schedule is not shifted. The result is on the times'
    device, best the CPU, from which one copy brings all of it to another.
    """
    shift = schedule.size_shift(side, base_side, diffusion.shift_exponent)
    log_snr = schedule.log_snr(time, diffusion.schedule, shift)
    alpha, sigma = schedule.alpha_sigma(log_snr, diffusion.schedule)
    weight = objective.weight(diffusion.objective, diffusion.weighting, log_snr, sigma)
    return torch.stack([alpha, sigma, schedule.alpha_bar(log_snr), weight])


def denoising_loss(
    model: nn.Module,
    diffusion: DiffusionConfig,
    levels: Tensor,
    latent: Tensor,
    condition: Tensor,
    noise: Tensor,
    coordinates: Tensor | None = None,
    cloud_key: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean squared error of a prediction, per sample: (weighted, unweighted), each [B].

    The weighted one counts coarser scales too, as ``diffusion.multiscale`` says. ``levels`` are
    those of ``noise_levels``, on the device of ``latent`` and ``noise`` [B, L, h, w]; other
    arguments are those of R2ID.forward.
    """
    alpha, sigma, alpha_bar, weight = levels.unbind()
    a, s = (rearrange(part, "b -> b 1 1 1") for part in (alpha, sigma))
    predicted = model(a * latent + s * noise, alpha_bar, condition, coordinates, cloud_key)
    target = objective.target(diffusion.objective, latent, noise, a, s)
    difference = predicted - target
    error = difference.square().flatten(1).mean(1)
    return weight * (error + _coarse_errors(difference, diffusion.multiscale)), error


def _coarse_errors(difference: Tensor, halvings: int) -> Tensor:
    """Sum the squared means of squares of s×s cells, each weighted by s, s = 2, 4, … 2^halvings.

    difference [B, L, h, w] of prediction and target → [B]. Means commute with differences, so these
    are the errors of predictions that are averaged down (Hoogeboom et al. 2023, "Simple diffusion",
    section 3.2). A square that hangs over the edge is the mean of the cells that it holds.
    """
    total = torch.zeros(len(difference), device=difference.device)
    for side in (2**power for power in range(1, halvings + 1)):
        means = F.avg_pool2d(difference, side, ceil_mode=True, count_include_pad=False)
        total = total + side * means.square().flatten(1).mean(1)
    return total
