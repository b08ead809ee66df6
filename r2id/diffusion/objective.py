"""What the network predicts, how errors are weighted, and the data that a prediction implies.

x₀ is the data, ε standard normal noise and x = α·x₀ + σ·ε the noised grid. Amplitudes α and σ must
broadcast against the data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.config.diffusion import Objective, Weighting

_GAMMA = 5.0


def target(
    objective: Objective, data: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> Tensor:
    """Return what the network should predict, in the shape of ``data``.

    ε or x₀ (Ho et al. 2020), v = α·ε − σ·x₀ (Salimans & Ho 2022), or for "flow" the velocity ε − x₀
    (Lipman et al. 2023).
    """
    if objective in ("epsilon", "x0"):
        return noise if objective == "epsilon" else data
    return alpha * noise - sigma * data if objective == "v" else noise - data


def to_data_and_noise(
    objective: Objective, x: Tensor, prediction: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the (x₀, ε) that a prediction at x = α·x₀ + σ·ε implies; inverts ``target``.

    Epsilon divides by α and x0 by σ, which the limits of logSNR keep from vanishing.
    """
    if objective == "epsilon":
        return (x - sigma * prediction) / alpha, prediction
    if objective == "x0":
        return prediction, (x - alpha * prediction) / sigma
    if objective == "v":
        # (x, v) is (x₀, ε) rotated by the angle φ with cos φ = α, sin φ = σ; this rotates it back.
        return alpha * x - sigma * prediction, sigma * x + alpha * prediction
    # With α + σ = 1, x is a point of the line from x₀ to ε, and the prediction is that line.
    return x - sigma * prediction, x + alpha * prediction


def weight(objective: Objective, weighting: Weighting, log_snr: Tensor, sigma: Tensor) -> Tensor:
    """Return the factor of a prediction's squared error, in the shape of log_snr.

    uniform: 1. min_snr: min(SNR, γ) on the squared error of x₀, γ = 5 (Hang et al. 2023).
    soft_min_snr: SNR·γ/(SNR + γ) instead (Crowson et al. 2024), which is smooth where that has a
    corner. The last two are converted from the error of x₀ to that of the objective. An error e of
    the prediction is an error of x₀ of e for x0, e/√SNR for epsilon, and σ·e for v and flow.
    """
    if weighting == "uniform":
        return torch.ones_like(log_snr)
    snr = torch.exp(log_snr)
    x0_weight = snr.clamp(max=_GAMMA) if weighting == "min_snr" else snr * _GAMMA / (snr + _GAMMA)
    if objective == "x0":
        return x0_weight
    return x0_weight * (torch.exp(-log_snr) if objective == "epsilon" else sigma.square())
