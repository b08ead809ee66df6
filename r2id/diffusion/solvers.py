"""Samplers: functions of (denoise, noise, log_snrs).

``denoise(x, log_snr) → (x₀, ε)`` is the network's opinion of a noised grid; ``log_snrs`` [S + 1]
rise from noise to data. The last step returns the network's x₀ itself: nothing is divided by a
vanishing amplitude, no noise estimate used twice.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from r2id.diffusion.schedule import Kind, alpha_sigma, log_snr

Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Fresh = Callable[[int], Tensor]


def time_steps(steps: int, kind: Kind, shift: float) -> Tensor:
    """logSNR at S evenly spaced times from t = 1 (noise) down to t = 1/S: float32 [S]."""
    return log_snr(torch.arange(steps, 0, -1) / steps, kind, shift)


def ddim(
    denoise: Denoise,
    noise: Tensor,
    log_snrs: Tensor,
    kind: Kind,
    eta: float = 0.0,
    fresh: Fresh | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): deterministic with η = 0, ancestral (DDPM) with η = 1.

    ``fresh(i)`` is the noise that step i adds, of standard deviation η·σ'·√(1 − SNR/SNR'), which is
    eq. 16 for any schedule.
    """
    x = noise * alpha_sigma(log_snrs[0], kind)[1]
    for step, (here, there) in enumerate(pairwise(log_snrs)):
        data, eps = denoise(x, here)
        alpha, sigma = alpha_sigma(there, kind)
        if eta and fresh is not None:
            share = eta**2 * -torch.expm1(here - there)  # of the variance of the noise
            eps = (1 - share).clamp(min=0).sqrt() * eps + share.sqrt() * fresh(step)
        x = alpha * data + sigma * eps
    return denoise(x, log_snrs[-1])[0]


def euler(denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind) -> Tensor:
    """Euler's method on the probability-flow ODE.

    It steps along the path that is straight, or round, where data and noise are fixed:
    dx/dσ = ε − x₀ for flow (where this is DDIM), dx/dφ = v with tan φ = σ/α for the others.
    """
    return _along_the_path(denoise, noise, log_snrs, kind, correct=False)


def heun(denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind) -> Tensor:
    """Heun's method on the ODE of ``euler``: second order, two evaluations per step.

    Karras et al. 2022, algorithm 1.
    """
    return _along_the_path(denoise, noise, log_snrs, kind, correct=True)


def _along_the_path(
    denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind, correct: bool
) -> Tensor:
    def place(log_snr: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(log_snr, kind)
        return sigma if kind == "flow" else torch.atan2(sigma, alpha)

    def slope(x: Tensor, log_snr: Tensor) -> Tensor:
        data, eps = denoise(x, log_snr)
        alpha, sigma = alpha_sigma(log_snr, kind)
        return eps - data if kind == "flow" else alpha * eps - sigma * data

    x = noise * alpha_sigma(log_snrs[0], kind)[1]
    for here, there in pairwise(log_snrs):
        step, first = place(there) - place(here), slope(x, here)
        ahead = x + step * first
        x = x + step * 0.5 * (first + slope(ahead, there)) if correct else ahead
    return denoise(x, log_snrs[-1])[0]


def dpmpp_2m(denoise: Denoise, noise: Tensor, log_snrs: Tensor, kind: Kind) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation per step."""
    x = noise * alpha_sigma(log_snrs[0], kind)[1]
    previous: tuple[Tensor, Tensor] | None = None  # the last x₀ and its step in half logSNR
    for here, there in pairwise(log_snrs):
        data, _ = denoise(x, here)
        step = 0.5 * (there - here)
        # Clamped ends of the schedule make steps of length 0, over which nothing can be
        # extrapolated.
        best = data
        if previous is not None and previous[1] > 0:
            best = data + 0.5 * step / previous[1] * (data - previous[0])
        previous = (data, step)
        (_, sigma), (alpha_next, sigma_next) = alpha_sigma(here, kind), alpha_sigma(there, kind)
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-step) * best
    return denoise(x, log_snrs[-1])[0]


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor, Kind], Tensor]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}
