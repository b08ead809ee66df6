"""Image metrics as pure functions of tensors. Each names its equation and paper.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

_SSIM_SIDE, _SSIM_SIGMA, _SSIM_K = 11, 1.5, (0.01, 0.03)  # Wang et al. 2004, section III-B
_SSIM_PIXELS = 1 << 16  # compared at once: in float64, what fits into a cache is 7 times as fast
_NEIGHBOUR = 3  # k of Kynkäänniemi et al. 2019
_LEAST_POWER = 1e-12  # of a ring, so that a set of flat images has a finite distance
_ROWS = 1000  # features at once whose kernels with all others are held in memory
_POINTS = 250  # the same for their distances, of which there are several kinds
_CANDIDATES = 16  # more neighbours than are wanted whose distances are computed exactly


def mse(images: Tensor, truth: Tensor) -> Tensor:
    """Return the mean squared error of each image: two [N, C, H, W] → float64 [N]."""
    return (images.double() - truth.double()).square().flatten(1).mean(1)


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """Return the structural similarity (SSIM) of each image: two [N, C, H, W] → float64 [N].

    Images are in [−1, 1]; identical ones score 1. Following Wang et al. 2004, local means,
    variances and covariances are taken under an 11×11 Gaussian window (σ 1.5) at every position
    where it fits, and the result is averaged over positions and colours. A side shorter than 11
    pixels uses the largest odd window that fits.
    """
    step = max(1, _SSIM_PIXELS // images[0, 0].numel())
    return torch.cat(
        [_ssim(*parts) for parts in zip(images.split(step), truth.split(step), strict=True)]
    )


def _ssim(images: Tensor, truth: Tensor) -> Tensor:
    x, y = images.double() + 1, truth.double() + 1  # SSIM is defined for values from 0 up
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x.square(), _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = ((2 * k) ** 2 for k in _SSIM_K)  # (k·L)² with a dynamic range L of 2
    likeness = (
        (2 * mean_x * mean_y + c1)
        * (2 * covariance + c2)
        / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    )
    return likeness.flatten(1).mean(1)


def _blur(images: Tensor) -> Tensor:
    """Average under the Gaussian window wherever it fits: [N, C, H, W] → [N, C, H', W'].

    The window is separable, so it is applied along the height and then along the width.
    """
    channels = images.shape[1]
    for axis in (2, 3):
        length = min(_SSIM_SIDE, images.shape[axis] - (images.shape[axis] + 1) % 2)
        offset = torch.arange(length, dtype=images.dtype, device=images.device) - length // 2
        window = torch.exp(-offset.square() / (2 * _SSIM_SIGMA**2))
        shape = (1, 1, length, 1) if axis == 2 else (1, 1, 1, length)
        kernel = (window / window.sum()).reshape(shape).expand(channels, -1, -1, -1)
        images = F.conv2d(images, kernel, groups=channels)
    return images


def frechet_distance(one: Tensor, other: Tensor) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to features [N, D] and [M, D].

    |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2·(Σ₁ Σ₂)^½) (Dowson & Landau 1982; as FID: Heusel et al. 2017),
    computed by torchmetrics in float64. NaN where features are not finite. Raises
    ValueError unless N and M are at least 2.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(f"{len(one)} and {len(other)} features: a covariance takes at least 2")
    if not (one.isfinite().all() and other.isfinite().all()):
        return math.nan  # the eigenvalues of such features may even end the process
    metric = FrechetInceptionDistance(_Identity(one.shape[1]))
    metric.update(one.double().cpu(), real=True)
    metric.update(other.double().cpu(), real=False)
    return max(0.0, float(metric.compute()))  # rounding may leave it slightly negative


class _Identity(nn.Module):
    """Stands in for the Inception network of torchmetrics: the features are computed already."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_features = count

    def forward(self, features: Tensor) -> Tensor:
        return features


def kernel_distance(one: Tensor, other: Tensor) -> float:
    """Return the kernel distance (KID) between features [N, D] and [M, D]; it may be negative.

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y / D + 1)³
    (Bińkowski et al. 2018), over all pairs. Its expectation does not depend on N and M, so it suits
    few images. Raises ValueError unless N and M are at least 2.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError(
            f"{len(one)} and {len(other)} features: a kernel distance takes at least 2"
        )
    return _kernel(one, one) + _kernel(other, other) - 2 * _kernel(one, other)


def _kernel(one: Tensor, other: Tensor) -> float:
    """Return the kernel's mean over pairs; over pairs of different features within one set."""
    one, other, same = one.double(), other.double(), one is other
    scale = one.shape[1]
    total = sum(float((part @ other.T / scale + 1).pow(3).sum()) for part in one.split(_ROWS))
    if not same:
        return total / (len(one) * len(other))
    own = float((one.square().sum(1) / scale + 1).pow(3).sum())
    return (total - own) / (len(one) * (len(one) - 1))


def spectral_distance(one: Tensor, other: Tensor) -> float:
    """Return the mean absolute log ratio of two radial spectra [R] of images of one size.

    It is 0 for equal power at all scales, and grows when one set is blurred or noised: a set with
    half the power in every ring is at log 2 = 0.69.
    """
    return float((one.clamp(min=_LEAST_POWER) / other.clamp(min=_LEAST_POWER)).log().abs().mean())


def precision_and_recall(samples: Tensor, real: Tensor) -> tuple[float, float]:
    """Return improved precision and recall of samples [N, D] against real features [M, D].

    Following Kynkäänniemi et al. 2019, a set's manifold is the union of balls around its features,
    each reaching to the third nearest other feature (k = 3). Precision is the share of samples
    inside the real manifold (fidelity); recall is the share of real features inside the samples'
    manifold (diversity). Both depend on N and M: compare only sets of equal sizes.

    Raises ValueError unless N and M are at least 4.
    """
    if min(len(samples), len(real)) <= _NEIGHBOUR:
        raise ValueError(
            f"{len(samples)} and {len(real)} features: a manifold takes at least {_NEIGHBOUR + 1}"
        )
    return _covered(samples, real), _covered(real, samples)


def _covered(points: Tensor, centres: Tensor) -> float:
    """Return the share of points within the manifold of the centres."""
    points, centres = points.double(), centres.double()
    # k + 1, because each centre's nearest neighbour is the centre itself at distance 0.
    radii = nearest(centres, centres, _NEIGHBOUR + 1)[0][:, -1]
    covered = []
    for part, low, high in _bounds(points, centres):
        inside = (high < radii.square()).any(1)
        unclear = ~inside & (low <= radii.square()).any(1)
        inside[unclear] = (_distances(part[unclear], centres) <= radii).any(1)
        covered.append(inside)
    return float(torch.cat(covered).double().mean())


def nearest(points: Tensor, others: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the nearest of ``others`` [M, D] to each of ``points`` [N, D].

    Returns their distances, float64, and indices, int64: both [N, count], the nearest first.
    """
    if count > len(others):
        raise ValueError(f"{count} neighbours of {len(others)} features: there are not as many")
    points, others = points.double(), others.double()
    distances, indices = [], []
    for part, low, high in _bounds(points, others):
        # At least ``count`` are within the count-th upper bound, so none above it is chosen.
        possible = (low <= high.kthvalue(count, dim=1, keepdim=True).values).sum(1)
        few = possible <= count + _CANDIDATES
        candidates = low.topk(int(possible.clamp(max=count + _CANDIDATES).max()), largest=False)
        exact = _distances(part[:, None], others[candidates.indices])[:, 0]
        found, place = exact.topk(count, largest=False)
        index = candidates.indices.gather(1, place)
        found[~few], index[~few] = _distances(part[~few], others).topk(count, largest=False)
        distances.append(found)
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    # By differences: a matrix product loses precision by cancellation, so that a feature would not
    # be at distance 0 from itself, and duplicates would fall outside their own balls.
    return torch.cdist(one, other, compute_mode="donot_use_mm_for_euclid_dist")


def _bounds(points: Tensor, others: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (some of the points, lower and upper bounds of their squared distances to others).

    Both are float64.
    A matrix product is many times as fast as differences are. Its rounding errors are bounded by
    those of sums of D products (Higham 2002, section 3.1), so that few distances have to be
    computed from differences to give what all of them would. Features are centred because errors
    grow with their squares.
    """
    centre = others.mean(0)
    centred = others - centre
    squares = centred.square().sum(1)
    # 2·D·ε would do for the sums themselves; the rest is for centring, sums of three and roots.
    relative = 8 * (others.shape[1] + 8) * torch.finfo(torch.float64).eps
    for part in points.split(_POINTS):
        x = part - centre
        sizes = x.square().sum(1, keepdim=True) + squares
        product = torch.addmm(sizes, x, centred.T, alpha=-2)
        error = sizes.mul_(relative)
        yield part, product - error, product + error


def class_accuracy(predicted: Tensor, labels: Tensor, classes: int) -> list[float | None]:
    """Return the accuracy within each class; None for a class without images."""
    correct = (predicted == labels).double()
    return [
        float(correct[labels == k].mean()) if (labels == k).any() else None for k in range(classes)
    ]
