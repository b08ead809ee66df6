"""What the network predicts, how errors are weighted, and the way from a prediction to data and noise.

All functions take amplitudes α, σ that broadcast against the data.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Objective = Literal["epsilon", "v", "flow"]


def target(objective: Objective, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """ε (Ho et al. 2020), v = α·ε − σ·x₀ (Salimans & Ho 2022) or the velocity ε − x₀ (Lipman et al. 2023)."""
    if objective == "epsilon":
        return noise
    return alpha * noise - sigma * data if objective == "v" else noise - data


def to_data_and_noise(objective: Objective, x: Tensor, prediction: Tensor, alpha: Tensor,
                      sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x₀, ε) implied by a prediction at x = α·x₀ + σ·ε; the inverse of target."""
    if objective == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if objective == "v":
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction
    return x - sigma * prediction, x + alpha * prediction


def weight(objective: Objective, weighting: str, log_snr: Tensor, sigma: Tensor, gamma: float = 5.0) -> Tensor:
    """Factor of the squared error of a prediction, the shape of log_snr.

    uniform: 1. min_snr: min(SNR, γ) on the error of x₀ (Hang et al. 2023), converted to the objective: that error is
    the prediction's times 1/√SNR for ε, σ for v and σ for the velocity.
    """
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    clipped = torch.exp(log_snr).clamp(max=gamma)
    return clipped * (torch.exp(-log_snr) if objective == "epsilon" else sigma.square())
