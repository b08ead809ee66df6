"""Solvers: functions of (denoise, x, log_snrs, kind) that turn noise into samples.

``log_snrs`` [S] rise from noise to data; ``denoise(x, step) → (x₀, ε)`` estimates data and noise of
a grid that is noised to ``log_snrs[step]``; ``x`` is the noised grid at the first of them; ``kind``
is the schedule's, which amplitudes depend on. A solver steps from each of them to the next, and
from the last one to the data by returning the network's x₀ itself, so that no step ends where the
noise's amplitude vanishes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from r2id.config.diffusion import NoiseSchedule
from r2id.diffusion.schedule import alpha_sigma

Denoise = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x, number of the step) → (x₀, ε)."""
Fresh = Callable[[int], Tensor]
"""Number of a step → new standard normal noise, in the shape of x."""


def time_steps(steps: int, start: float = 1.0) -> Tensor:
    """Return S evenly spaced times from t = start down to t = start/S: float32 [S].

    Time 1 is pure noise, and time 0 the data.
    """
    return start * torch.arange(steps, 0, -1, dtype=torch.float32) / steps


def ddim(
    denoise: Denoise,
    x: Tensor,
    log_snrs: Tensor,
    kind: NoiseSchedule,
    eta: float = 0.0,
    fresh: Fresh | None = None,
) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12): deterministic with η = 0, ancestral (DDPM) with η = 1.

    Step i goes to σ' and SNR' and adds ``fresh(i)`` with a standard deviation of η·σ'·√(1 −
    SNR/SNR'), which is eq. 16 for any schedule. Without ``fresh``, η has no effect.
    """
    for step, (here, there) in enumerate(pairwise(log_snrs)):
        data, eps = denoise(x, step)
        alpha, sigma = alpha_sigma(there, kind)
        if eta and fresh is not None:
            # Share of fresh noise in the variance of ε; the estimate makes up the rest.
            share = eta**2 * -torch.expm1(here - there)
            eps = (1 - share).clamp(min=0).sqrt() * eps + share.sqrt() * fresh(step)
        x = alpha * data + sigma * eps
    return denoise(x, len(log_snrs) - 1)[0]


def euler(denoise: Denoise, x: Tensor, log_snrs: Tensor, kind: NoiseSchedule) -> Tensor:
    """Euler's method on the probability-flow ODE: first order, one evaluation per step.

    For flow it is dx/dσ = ε − x₀, whose paths are straight lines where the estimates stay the same;
    this is DDIM. For the other schedules it is dx/dφ = v with tan φ = σ/α, whose paths are arcs.
    """
    return _along_the_path(denoise, x, log_snrs, kind, correct=False)


def heun(denoise: Denoise, x: Tensor, log_snrs: Tensor, kind: NoiseSchedule) -> Tensor:
    """Heun's method on the ODE of ``euler``: second order, two evaluations per step.

    Karras et al. 2022, algorithm 1. With schedule ``linear_beta`` it is hardly better than Euler:
    much noise is left at the last time, and from there x₀ is estimated at once.
    """
    return _along_the_path(denoise, x, log_snrs, kind, correct=True)


def _along_the_path(
    denoise: Denoise, x: Tensor, log_snrs: Tensor, kind: NoiseSchedule, correct: bool
) -> Tensor:
    """Integrate the ODE of ``euler``, with Heun's correction if ``correct``."""

    def place(log_snr: Tensor) -> Tensor:
        """The variable that is integrated over, σ or φ."""
        alpha, sigma = alpha_sigma(log_snr, kind)
        return sigma if kind == "flow" else torch.atan2(sigma, alpha)

    def slope(x: Tensor, step: int) -> Tensor:
        """The derivative of x by that variable."""
        data, eps = denoise(x, step)
        alpha, sigma = alpha_sigma(log_snrs[step], kind)
        return eps - data if kind == "flow" else alpha * eps - sigma * data

    for step, (here, there) in enumerate(pairwise(log_snrs)):
        length, first = place(there) - place(here), slope(x, step)
        ahead = x + length * first  # Euler's step; Heun's takes the mean of the slopes at both ends
        x = x + length * 0.5 * (first + slope(ahead, step + 1)) if correct else ahead
    return denoise(x, len(log_snrs) - 1)[0]


def dpmpp_2m(denoise: Denoise, x: Tensor, log_snrs: Tensor, kind: NoiseSchedule) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation per step."""
    previous: tuple[Tensor, Tensor] | None = None  # the last x₀ and the length of its step
    for step, (here, there) in enumerate(pairwise(log_snrs)):
        data, _ = denoise(x, step)
        length = 0.5 * (there - here)  # in the paper's λ = log(α/σ), half of logSNR
        # x₀ extrapolated to the middle of the step. Where logSNR was clamped, steps have length 0,
        # from which nothing can be extrapolated.
        best = data
        if previous is not None and previous[1] > 0:
            best = data + 0.5 * length / previous[1] * (data - previous[0])
        previous = (data, length)
        (_, sigma), (alpha_next, sigma_next) = alpha_sigma(here, kind), alpha_sigma(there, kind)
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-length) * best
    return denoise(x, len(log_snrs) - 1)[0]


SOLVERS: dict[str, Callable[[Denoise, Tensor, Tensor, NoiseSchedule], Tensor]] = {
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "heun": heun,
}
