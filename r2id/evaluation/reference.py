"""Sets of images as an extractor sees them, whole and by windows, and how far one is from another.

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
from r2id.evaluation.extractor import Extractor
from r2id.evaluation.metrics import frechet_distance, precision_and_recall
from r2id.models.coords import Size

BATCH = 100
MOST_REAL = 10_000  # images that samples are compared with

WINDOW_RULE = (
    "one window of half the height and half the width per image, at a place drawn by its number"
)

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Seen:
    """Features float32 [N, D] of images, and of a window of each."""

    whole: Tensor
    windows: Tensor

    def __len__(self) -> int:
        return len(self.whole)


def see(extractor: Extractor, batches: Iterable[Tensor]) -> Seen:
    """Of images [N, C, H, W] in [−1, 1], in as many batches as one likes."""
    whole, windows, first = [], [], 0
    for images in batches:
        whole.append(extractor.features(images))
        windows.append(extractor.features(cut_windows(images, first)))
        first += len(images)
    return Seen(torch.cat(whole), torch.cat(windows))


def cut_windows(images: Tensor, first: int = 0) -> Tensor:
    """A window of half the height and width of each image, at its own pixels: [N, C, H, W] → [N, C, ⌈H/2⌉, ⌈W/2⌉].

    The place is a share of the room there is and depends on the image's number alone, ``first`` on, so that image i is cut
    at the same place of the picture at every size. In features of windows distances see detail that is lost when a large
    image is brought to the extractor's size (patch-FID: Chai et al. 2022, "Any-resolution training").
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


def compare(found: Seen, real: Seen) -> Figures:
    """Fréchet distance of the images and of their windows, precision and recall; None where too few images make none.

    Precision and recall are of as many of both as there are of the fewer, evenly spaced.
    """
    figures: Figures = {"frechet": None, "patch_frechet": None, "precision": None, "recall": None}
    count = min(len(found), len(real))
    if count > 1:
        figures |= {
            "frechet": frechet_distance(found.whole, real.whole),
            "patch_frechet": frechet_distance(found.windows, real.windows),
        }
    if count > 3:
        figures["precision"], figures["recall"] = precision_and_recall(
            _evenly(found.whole, count), _evenly(real.whole, count)
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
    """Images [N, C, *size] in [−1, 1] and labels int64 [N] of a split, or of those ``indices``; ``limit`` of them evenly
    spaced."""
    data = data.model_copy(update={"size": size, "latents": None})
    for batch in eval_loader(shards, data, split=split, batch=BATCH, limit=limit, indices=indices):
        yield batch["image"], batch["label"]


def _evenly(features: Tensor, count: int) -> Tensor:
    return features[torch.arange(count) * len(features) // count]
