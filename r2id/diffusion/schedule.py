"""Noise schedules in log signal-to-noise ratio, and their shift with the size of the diffused grid.

x_t = α·x₀ + σ·ε with logSNR = log(α²/σ²). Time t runs from 0 (data) to 1 (noise).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r2id.config.diffusion import NoiseSchedule

# Limits of logSNR. Beyond them a sample is noise, or data, for all practical purposes; within them
# neither amplitude is so small that dividing by it would be a problem.
LOG_SNR_MIN, LOG_SNR_MAX = -10.0, 10.0

# Song et al. 2021, "Score-based generative modeling through SDEs", appendix C.
_BETA_MIN, _BETA_MAX = 0.1, 20.0


def log_snr(t: Tensor, kind: NoiseSchedule, shift: float = 0.0) -> Tensor:
    """Return logSNR at time t in [0, 1], minus ``shift``, within the limits; in the shape of t.

    cosine: −2·log tan(πt/2) (Nichol & Dhariwal 2021, as in Hoogeboom et al. 2023); linear_beta:
    ᾱ = exp(−β_min·t − (β_max − β_min)·t²/2) (Song et al. 2021); flow: α = 1 − t, σ = t (Lipman et
    al. 2023).
    """
    # Both ends are infinite; so near to them, every schedule is beyond the limits.
    t = t.clamp(1e-6, 1 - 1e-6)
    if kind == "cosine":
        value = -2.0 * torch.log(torch.tan(0.5 * math.pi * t))
    elif kind == "linear_beta":
        log_alpha_bar = -(_BETA_MIN * t + 0.5 * (_BETA_MAX - _BETA_MIN) * t.square())
        # log ᾱ/(1 − ᾱ); expm1, because 1 − ᾱ would be rounded to 0 near the data.
        value = log_alpha_bar - torch.log(-torch.expm1(log_alpha_bar))
    else:
        value = 2.0 * (torch.log1p(-t) - torch.log(t))
    return (value - shift).clamp(LOG_SNR_MIN, LOG_SNR_MAX)


def size_shift(side: float, base_side: float, exponent: float) -> float:
    """Return how much to lower a grid's logSNR: 2·k·log(n/n_base), with its side n = √(h·w).

    Averaging s×s cells divides the noise's variance by s², so on a larger grid the same noise hides
    less of the picture (Hoogeboom et al. 2023). The exponent k = 1 makes up for that.
    """
    return 2.0 * exponent * math.log(side / base_side)


def alpha_sigma(log_snr: Tensor, kind: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Return the amplitudes of signal and noise: α² + σ² = 1, or α + σ = 1 for flow."""
    # α²/σ² = e^logSNR gives α² = sigmoid(logSNR), or with α + σ = 1, α = sigmoid(logSNR/2).
    half = 0.5 if kind == "flow" else 1.0
    alpha, sigma = torch.sigmoid(half * log_snr), torch.sigmoid(-half * log_snr)
    return (alpha, sigma) if kind == "flow" else (alpha.sqrt(), sigma.sqrt())


def alpha_bar(log_snr: Tensor) -> Tensor:
    """Return the share of signal in the variance, α²/(α² + σ²), which the network takes as time."""
    return torch.sigmoid(log_snr)
