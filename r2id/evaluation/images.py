"""Load images of a shard set into memory, and resize images by the evaluation's one rule.

Shape letters: N images · C colours · H, W image.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet, Split
from r2id.images import resize as resize_unclipped
from r2id.models.coords import Size

_LARGEST_AREA = 64 * 64  # pixels: inputs of the evaluation's own networks are shrunk to this area
RESIZE_RULE = "bicubic, antialiased, clipped to [−1, 1]"


def resize(images: Tensor, size: Size) -> Tensor:
    """Resize float images [N, C, H, W] in [−1, 1] bicubically and clip them to [−1, 1].

    The filter is that of r2id.images.resize. All figures are comparable because truth, samples and
    inputs of feature extractors are resized by this one rule.
    """
    if tuple(images.shape[2:]) == size:
        return images
    return resize_unclipped(images, size).clamp(-1, 1)


def load_images(
    shards: ShardSet, data: DataConfig, split: str, limit: int | None = None
) -> tuple[Tensor, Tensor]:
    """Load a split, or ``limit`` of its images, evenly spaced.

    Returns uint8 images [N, C, H, W] of ``data.size``, and labels int64 [N], −1 without a class.
    """
    assert data.size is not None
    batches = list(eval_loader(shards, data, split, 500, limit, as_float=False))
    images = torch.cat([batch["image"] for batch in batches])
    return images, torch.cat([batch["label"] for batch in batches])


def frequent_size(split: Split) -> Size:
    """Return the most frequent (height, width) of a split, shrunk to an area of at most 64×64.

    The aspect ratio is kept.
    """
    sizes, counts = np.unique(np.stack([split.height, split.width], 1), axis=0, return_counts=True)
    height, width = (int(side) for side in sizes[counts.argmax()])
    scale = min(1.0, (_LARGEST_AREA / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))
