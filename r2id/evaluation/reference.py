"""Extract features of sets of images and of windows in them, and compare two sets.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r2id import rng
from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import WorkError
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    precision_and_recall,
    spectral_distance,
)
from r2id.models.coords import Size
from r2id.spectra import radial_spectrum

BATCH = 100
MOST_REAL = 10_000  # real images that samples are compared with
_THINNING, _HALVING = 1, 2  # streams of random numbers

WINDOW_RULE = (
    "one window per image, at a place drawn by its number: half the height and half the width, or "
    "the extractor's input where the training images are more than twice as large, so that their "
    "windows are never shrunk"
)

METRICS = ("frechet", "patch_frechet", "kid", "spectrum", "precision", "recall")
"""What compare_features measures."""

Figures = dict[str, float | None]


@dataclass(frozen=True)
class ImageFeatures:
    """Features, float32 [N, D], of N images, and of one window of each."""

    whole: Tensor
    windows: Tensor
    size: Size | None = None
    """Height and width of the images."""
    spectrum: Tensor | None = None
    """Mean radial spectrum of the images (r2id.spectra.radial_spectrum)."""

    def __len__(self) -> int:
        return len(self.whole)


def extract_features(
    extractor: FeatureExtractor,
    batches: Iterable[Tensor],
    window: tuple[float, float] = (0.5, 0.5),
    name: Callable[[int], str] = "real image {}".format,
) -> ImageFeatures:
    """Extract features and spectrum of images [N, C, H, W] of one size, in [−1, 1], in batches.

    ``window`` is the part of the height and width that windows have (see window_part). The result
    does not depend on how the images are divided into batches.

    Raises WorkError with the ``name`` of the first image, counted from 0, whose features are not
    finite.
    """
    whole, windows, spectra, first = [], [], [], 0
    for images in batches:
        whole.append(extractor.features(images))
        windows.append(extractor.features(cut_windows(images, first, window)))
        spectra.append(radial_spectrum(images.double()).sum(0).cpu())
        check_finite(torch.cat([whole[-1], windows[-1]], 1), name, first)
        first += len(images)
    return ImageFeatures(
        torch.cat(whole),
        torch.cat(windows),
        (images.shape[2], images.shape[3]),
        torch.stack(spectra).sum(0) / first,
    )


def check_finite(features: Tensor, name: Callable[[int], str], first: int = 0) -> None:
    """Raise WorkError for the first features [N, D] that are not finite.

    It gives the ``name`` of their image; images are counted from ``first``. Distances of such
    features mean nothing, and one image spoils those of the whole set.
    """
    wrong = (~features.isfinite().all(1)).nonzero()
    if len(wrong):
        raise WorkError(f"{name(first + int(wrong[0]))}: its features are not finite numbers")


def window_part(size: Size, given: Size) -> tuple[float, float]:
    """Return the part of height and width that windows of a set of images have.

    Windows of images of the size that is compared with are never shrunk to the extractor's input
    ``given``, so that their pixels are seen as they are. The same part is cut at other sizes.
    """
    return min(0.5, given[0] / size[0]), min(0.5, given[1] / size[1])


def cut_windows(images: Tensor, first: int = 0, part: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """Cut a window of a part of the sides out of each image, rounded up to whole pixels.

    [N, C, H, W] → [N, C, ⌈part·H⌉, ⌈part·W⌉]. Features of windows show detail that is lost when a
    large image is shrunk to the extractor's input (patch-FID: Chai et al. 2022, "Any-resolution
    training"). Images are numbered from ``first``. The relative position of the window depends only
    on the image's number, so that it shows the same part of the picture at every size.
    """
    height, width = images.shape[2:]
    sides = [
        max(1, math.ceil(round(p * side, 6))) for p, side in zip(part, (height, width), strict=True)
    ]
    places = rng.uniform(rng.fold(torch.arange(first, first + len(images))), 2)
    room = torch.tensor([height - sides[0] + 1, width - sides[1] + 1])
    top, left = (places * room).long().to(images.device).unbind(1)
    rows = top[:, None, None, None] + torch.arange(sides[0], device=images.device)[:, None]
    columns = left[:, None, None, None] + torch.arange(sides[1], device=images.device)
    number = torch.arange(len(images), device=images.device)[:, None, None, None]
    colour = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[number, colour, rows, columns]


def compare_features(features: ImageFeatures, real: ImageFeatures) -> Figures:
    """Compare images with real ones.

    Fréchet distances of both features, kernel distance (``kid``), precision and recall, and the
    distance of the spectra, which is for images of one size alone. A metric is None if there are
    too few images for it, or it is not for these. Precision and recall depend on the numbers of
    images, so the larger set is thinned at random to the size of the smaller.
    """
    figures: Figures = dict.fromkeys(METRICS)
    count = min(len(features), len(real))
    if count > 1:
        figures |= {
            "frechet": frechet_distance(features.whole, real.whole),
            "patch_frechet": frechet_distance(features.windows, real.windows),
            "kid": kernel_distance(features.whole, real.whole),
        }
    if count > 3:
        figures["precision"], figures["recall"] = precision_and_recall(
            _thin(features.whole, count), _thin(real.whole, count)
        )
    ours, theirs = features.spectrum, real.spectrum
    if count > 1 and ours is not None and theirs is not None and features.size == real.size:
        figures["spectrum"] = spectral_distance(ours, theirs) if len(ours) else None
    return figures


def real_batches(
    shards: ShardSet,
    data: DataConfig,
    split: str,
    size: Size,
    limit: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images [N, C, *size] in [−1, 1] and labels int64 [N] of a split.

    ``indices`` selects samples of the split; ``limit`` takes that many of them, evenly spaced.
    """
    data = data.model_copy(update={"size": size, "latents": None})
    for batch in eval_loader(shards, data, split=split, batch=BATCH, limit=limit, indices=indices):
        yield batch["image"], batch["label"]


def _thin(features: Tensor, count: int) -> Tensor:
    """Choose ``count`` features at random, always the same ones.

    Not every k-th: samples take classes in turn, of which even steps would leave some out.
    """
    if count == len(features):
        return features
    return features[rng.subset(rng.fold(_THINNING), len(features), count)]


def frechet_spread(features: ImageFeatures, real: ImageFeatures) -> float | None:
    """Estimate how far chance moves the Fréchet distance of samples: its standard error.

    That is half the difference between the distances of two random halves of the samples. None if
    there are too few of them.
    """
    if min(len(features) // 2, len(real)) < 2:
        return None
    order = rng.subset(rng.fold(_HALVING), len(features), len(features))
    halves = features.whole[order].tensor_split(2)
    one, other = (frechet_distance(half, real.whole) for half in halves)
    return abs(one - other) / 2
