"""What is measured: pure functions of tensors.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_MSE = 1e-10  # below it two images in [−1, 1] are the same for all purposes; it bounds the PSNR at 106 dB


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image: two [N, C, H, W] → float64 [N]."""
    return (images.double() - truth.double()).square().flatten(1).mean(1)


def psnr(error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of mean squared errors on [−1, 1], where the peak is 2; the shape of error."""
    return 10 * torch.log10(4 / error.clamp(min=_SMALLEST_MSE))


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features [N, D] and [M, D] (N, M ≥ 2).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁^½ Σ₂ Σ₁^½)^½) (Dowson & Landau 1982; of images: Heusel et al. 2017), in float64.
    The product is symmetric and positive, so its root's trace is the sum of the roots of its eigenvalues: no matrix
    root of a general matrix, which would be inaccurate when N or M is not larger than D.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"{len(one)} and {len(other)} features: a covariance takes at least 2")
    one, other = one.double(), other.double()
    root = _root(torch.cov(one.T).reshape(one.shape[1], -1))
    second = torch.cov(other.T).reshape(other.shape[1], -1)
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    between = (one.mean(0) - other.mean(0)).square().sum()
    return max(0.0, float(between + root.square().sum() + second.trace() - 2 * cross))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a symmetric positive matrix [D, D]."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Share of each class's images that are judged to be of it; None for a class without images."""
    right = (predicted == labels).double()
    return [float(right[labels == k].mean()) if (labels == k).any() else None for k in range(classes)]
