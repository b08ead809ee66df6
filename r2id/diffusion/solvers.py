"""Samplers: functions of (denoise, noise, log_snrs).

``denoise(x, log_snr) → (x₀, ε)`` is the network's opinion of a noised grid; ``log_snrs`` [S + 1] rise from noise to data.
The last step returns the network's x₀ itself: nothing is divided by a vanishing amplitude, no noise estimate used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from r2id.diffusion.schedule import Kind, alpha_sigma, log_snr

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def time_steps(steps: int, kind: Kind, shift: float) -> Tensor:
    """logSNR at S evenly spaced times from t = 1 (noise) down to t = 1/S: float32 [S]."""
    return log_snr(torch.arange(steps, 0, -1) / steps, kind, shift)


def ddim(denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, eq. 12, η = 0); with the flow schedule this is Euler's method."""
    x = noise * alpha_sigma(log_snrs[0], kind)[1]
    for here, there in pairwise(log_snrs):
        data, eps = denoise(x, here)
        alpha, sigma = alpha_sigma(there, kind)
        x = alpha * data + sigma * eps
    return denoise(x, log_snrs[-1])[0]


def dpmpp_2m(denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation per step."""
    x = noise * alpha_sigma(log_snrs[0], kind)[1]
    previous: tuple[Tensor, Tensor] | None = None  # the last x₀ and its step in half logSNR
    for here, there in pairwise(log_snrs):
        data, _ = denoise(x, here)
        step = 0.5 * (there - here)
        # Clamped ends of the schedule make steps of length 0, over which nothing can be extrapolated.
        best = data
        if previous is not None and previous[1] > 0:
            best = data + 0.5 * step / previous[1] * (data - previous[0])
        previous = (data, step)
        (_, sigma), (alpha_next, sigma_next) = alpha_sigma(here, kind), alpha_sigma(there, kind)
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-step) * best
    return denoise(x, log_snrs[-1])[0]


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor, Kind], Tensor]] = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}
