"""What the network predicts, how errors are weighted, and what a prediction says of the data.

All functions take amplitudes α, σ that broadcast against the data.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Objective = Literal["epsilon", "x0", "v", "flow"]
Weighting = Literal["uniform", "min_snr", "soft_min_snr"]


def target(
    objective: Objective, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """What the network is to predict.

    ε or x₀ (Ho et al. 2020), v = α·ε − σ·x₀ (Salimans & Ho 2022) or the velocity ε − x₀ (Lipman et
    al. 2023).
    """
    if objective in ("epsilon", "x0"):
        return noise if objective == "epsilon" else data
    return alpha * noise - sigma * data if objective == "v" else noise - data


def to_data_and_noise(
    objective: Objective, x: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """(x₀, ε) implied by a prediction at x = α·x₀ + σ·ε; the inverse of target."""
    if objective == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if objective == "x0":
        return prediction, (x - alpha * prediction) / sigma
    if objective == "v":
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction
    return x - sigma * prediction, x + alpha * prediction


def weight(
    objective: Objective, weighting: Weighting, log_snr: Tensor, sigma: Tensor, gamma: float = 5.0
) -> Tensor:
    """Factor of the squared error of a prediction, the shape of log_snr.

    uniform: 1. min_snr: min(SNR, γ) on the error of x₀ (Hang et al. 2023); soft_min_snr: SNR·γ/(SNR
    + γ) (Crowson et al. 2024), which bends where that breaks. Both are converted to the objective:
    the error of x₀ is the prediction's own for x₀, and that times 1/√SNR for ε, σ for v and σ for
    the velocity.
    """
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    snr = torch.exp(log_snr)
    of_data = snr.clamp(max=gamma) if weighting == "min_snr" else snr * gamma / (snr + gamma)
    if objective == "x0":
        return of_data
    return of_data * (torch.exp(-log_snr) if objective == "epsilon" else sigma.square())
