"""Extract features of sets of images and of windows in them, and compare two sets.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from r2id import rng
from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.metrics import frechet_distance, precision_and_recall
from r2id.models.coords import Size

BATCH = 100
MOST_REAL = 10_000  # real images that samples are compared with

WINDOW_RULE = (
    "one window of half the height and half the width per image, at a place drawn by its number"
)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class ImageFeatures:
    """Features, float32 [N, D], of N images, and of one window of each."""

    whole: Tensor
    windows: Tensor

    def __len__(self) -> int:
        return len(self.whole)


def extract_features(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> ImageFeatures:
    """Extract features of batches of images [N, C, H, W] in [−1, 1].

    The result does not depend on how the images are divided into batches.
    """
    whole, windows, first = [], [], 0
    for images in batches:
        whole.append(extractor.features(images))
        windows.append(extractor.features(cut_windows(images, first)))
        first += len(images)
    return ImageFeatures(torch.cat(whole), torch.cat(windows))


def cut_windows(images: Tensor, first: int = 0) -> Tensor:
    """Cut a window of half the sides out of each image: [N, C, H, W] → [N, C, ⌈H/2⌉, ⌈W/2⌉].

    Features of windows show detail that is lost when a large image is shrunk to the extractor's
    input (patch-FID: Chai et al. 2022, "Any-resolution training"). Images are numbered from
    ``first``. The relative position of the window depends only on the image's number, so that it
    shows the same part of the picture at every size.
    """
    height, width = images.shape[2:]
    sides = -(-height // 2), -(-width // 2)
    places = rng.uniform(rng.fold(torch.arange(first, first + len(images))), 2)
    room = torch.tensor([height - sides[0] + 1, width - sides[1] + 1])
    top, left = (places * room).long().to(images.device).unbind(1)
    rows = top[:, None, None, None] + torch.arange(sides[0], device=images.device)[:, None]
    columns = left[:, None, None, None] + torch.arange(sides[1], device=images.device)
    number = torch.arange(len(images), device=images.device)[:, None, None, None]
    colour = torch.arange(images.shape[1], device=images.device)[:, None, None]
    return images[number, colour, rows, columns]


def compare_features(features: ImageFeatures, real: ImageFeatures) -> Figures:
    """Compare images with real ones: Fréchet distances of both features, precision and recall.

    A metric is None if there are too few images for it. Precision and recall depend on the numbers
    of images, so the larger set is thinned evenly to the size of the smaller.
    """
    figures: Figures = {"frechet": None, "patch_frechet": None, "precision": None, "recall": None}
    count = min(len(features), len(real))
    if count > 1:
        figures |= {
            "frechet": frechet_distance(features.whole, real.whole),
            "patch_frechet": frechet_distance(features.windows, real.windows),
        }
    if count > 3:
        figures["precision"], figures["recall"] = precision_and_recall(
            _evenly(features.whole, count), _evenly(real.whole, count)
        )
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


def _evenly(features: Tensor, count: int) -> Tensor:
    """Choose ``count`` features, evenly spaced."""
    return features[torch.arange(count) * len(features) // count]
