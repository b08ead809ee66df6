"""Find the training images that are nearest to samples, and measure how much was memorised.

Shape letters: N samples · M test images · K training images · C colours · H, W image · D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.metrics import nearest
from r2id.evaluation.reference import BATCH, check_finite, real_batches

SHOWN, NEIGHBOURS = 16, 3  # samples in the figure, and training images beside each
_MOST_TRAINING = 50_000  # images that are searched, evenly spaced
_NEAR = 0.01  # share of the test images that count as near
_SAME = 1e-3  # distance between features of one image, relative to the length of features


@dataclass(frozen=True)
class Neighbours:
    """The first samples [C, H, W], and the nearest training images of each with distances."""

    samples: Tensor
    images: list[list[Tensor]]
    distances: Tensor
    """[N, NEIGHBOURS]"""


def check_training_images(shards: ShardSet, data: DataConfig) -> None:
    """Raise InputError when the training split has fewer images than neighbours are shown."""
    total = len(shards.split(data.train_split))
    if total < NEIGHBOURS:
        raise InputError(
            f"{shards.folder}: split {data.train_split!r} has {total} images; the {NEIGHBOURS} "
            f"nearest training images of a sample take at least {NEIGHBOURS}"
        )


def find_neighbours(
    samples: Tensor, test: Tensor, extractor: FeatureExtractor, shards: ShardSet, data: DataConfig
) -> tuple[Neighbours, dict[str, Any]]:
    """Compare samples [N, C, H, W] with training images of their size in the extractor's features.

    ``test`` are the features [M, D] of test images of that size. Returns the neighbours of the
    first SHOWN samples, and what measure_copies says of all.

    There must be enough training images: see check_training_images.
    """
    size, total = (samples.shape[2], samples.shape[3]), len(shards.split(data.train_split))
    count = min(total, _MOST_TRAINING)
    searched = np.arange(count) * total // count

    def read(indices: np.ndarray) -> Iterator[Tensor]:
        batches = real_batches(shards, data, data.train_split, size, indices=indices)
        return (images for images, _ in batches)

    training = torch.cat([extractor.features(images) for images in read(searched)])
    check_finite(training, "training image {}".format)
    features = torch.cat([extractor.features(part) for part in samples.split(BATCH)])
    distances, found = nearest(features[:SHOWN], training, NEIGHBOURS)
    wanted, place = np.unique(searched[found.numpy()], return_inverse=True)
    images = torch.cat(list(read(wanted)))[torch.from_numpy(place.reshape(found.shape))]
    return Neighbours(samples[:SHOWN], [list(row) for row in images], distances), {
        "training_images": count,
        **measure_copies(features, test, training),
    }


def measure_copies(samples: Tensor, test: Tensor, training: Tensor) -> dict[str, Any]:
    """Say how near samples [N, D] are to training images [K, D], beside test images [M, D].

    ``near`` is the share of samples that are nearer to a training image than 1 % of the test images
    are. A model that has learned the distribution is at about 0.01, one that repeats its training
    images at 1; after Meehan, Chaudhuri & Dasgupta 2020, who compare the same distances. Test
    images that are training images, too, say nothing of that, and are only counted.
    """
    ours, theirs = (nearest(some, training, 1)[0][:, 0] for some in (samples, test))
    same = _SAME * float(training.norm(dim=1).mean())
    known = theirs <= same
    theirs = theirs[~known]
    bound = float(theirs.quantile(_NEAR)) if len(theirs) else same
    return {
        "samples": len(samples),
        "test_images": len(theirs),
        "test_images_in_training": int(known.sum()),
        "near": float((ours < bound).double().mean()),
        "near_distance": bound,
        "median_distance": float(ours.median()),
        "median_distance_of_test_images": float(theirs.median()) if len(theirs) else 0.0,
    }
