"""What is measured: pure functions of tensors.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

_SSIM_SIDE, _SSIM_SIGMA, _SSIM_K = 11, 1.5, (0.01, 0.03)  # Wang et al. 2004, section III-B
_SSIM_PIXELS = (
    1 << 20
)  # of images compared at once, for each of which some float64 values are in memory
_NEIGHBOUR = 3  # k of Kynkäänniemi et al. 2019
_ROWS = 1000  # features whose distances to all others are in memory at once


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Mean squared error of each image: two [N, C, H, W] → float64 [N]."""
    return (images.double() - truth.double()).square().flatten(1).mean(1)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image on [−1, 1]: two [N, C, H, W] → float64 [N], 1 where they are the same.

    Wang et al. 2004: a Gaussian window of 11×11 pixels, σ 1.5, wherever it fits into the image, and the mean over places
    and colours, of values from 0 up. A side of fewer than 11 pixels takes the largest odd window that fits it.
    """
    step = max(1, _SSIM_PIXELS // images[0, 0].numel())
    return torch.cat(
        [_ssim(*some) for some in zip(images.split(step), truth.split(step), strict=True)]
    )


def _ssim(images: Tensor, truth: Tensor) -> Tensor:
    x, y = images.double() + 1, truth.double() + 1
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x.square(), _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = ((2 * k) ** 2 for k in _SSIM_K)  # of values that range over 2
    likeness = (
        (2 * mean_x * mean_y + c1)
        * (2 * covariance + c2)
        / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    )
    return likeness.flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    """Gaussian means [N, C, H, W] → [N, C, H', W'] wherever the window fits."""
    channels = images.shape[1]
    for axis in (2, 3):
        length = min(_SSIM_SIDE, images.shape[axis] - (images.shape[axis] + 1) % 2)
        at = torch.arange(length, dtype=images.dtype, device=images.device) - length // 2
        window = torch.exp(-at.square() / (2 * _SSIM_SIGMA**2))
        shape = (1, 1, length, 1) if axis == 2 else (1, 1, 1, length)
        kernel = (window / window.sum()).reshape(shape).expand(channels, -1, -1, -1)
        images = F.conv2d(images, kernel, groups=channels)
    return images


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features [N, D] and [M, D] (N, M ≥ 2).

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁ Σ₂)^½) (Dowson & Landau 1982; of images: Heusel et al. 2017) by torchmetrics, in float64.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"{len(one)} and {len(other)} features: a covariance takes at least 2")
    metric = FrechetInceptionDistance(_Given(one.shape[1]))
    metric.update(one.double().cpu(), real=True)
    metric.update(other.double().cpu(), real=False)
    return max(0.0, float(metric.compute()))  # by rounding it may come out below


class _Given(nn.Module):
    """Features that are there already, in the place of a network."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features


def precision_and_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """How many samples could be real, and how much of what is real the samples cover: features [N, D] and [M, D], of which
    there are more than three → two shares.

    A set's manifold is the union of balls around its features, each as large as the distance to the third nearest other
    one; precision is the share of samples within the real manifold, recall the reverse (Kynkäänniemi et al. 2019). Both
    depend on the numbers, so that sets of one size alone compare.
    """
    if min(len(samples), len(real)) <= _NEIGHBOUR:
        raise ValueError(
            f"{len(samples)} and {len(real)} features: a manifold takes at least {_NEIGHBOUR + 1}"
        )
    return _covered(samples, real), _covered(real, samples)


def _covered(points: Tensor, centres: Tensor) -> float:
    """Share of points within the manifold of the centres."""
    # The nearest to a centre is itself, or one in the same place.
    radii = torch.cat(
        [
            _distances(some, centres).kthvalue(_NEIGHBOUR + 1, dim=1).values
            for some in centres.split(_ROWS)
        ]
    )
    return float(
        torch.cat([(_distances(some, centres) <= radii).any(1) for some in points.split(_ROWS)])
        .double()
        .mean()
    )


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # The way by a matrix product would leave an image at some distance from itself.
    return torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")


def class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Share of each class's images that are judged to be of it; None for a class without images."""
    right = (predicted == labels).double()
    return [
        float(right[labels == k].mean()) if (labels == k).any() else None for k in range(classes)
    ]
