"""How fast a loader worker reads a run's images or latents, measured on the run's own data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from r2id import rng
from r2id.config import DataConfig
from r2id.data.latents import MANIFEST as LATENTS
from r2id.data.latents import LatentCache, read_latents
from r2id.data.loader import ImageReader, split_buckets
from r2id.data.manifest import MANIFEST
from r2id.data.shards import ShardSet, Split

_SECONDS = 0.5  # of a measurement
_BATCH, _BATCHES = 32, 4  # images read at a time, and different times before they come again
_PIXELS = 10e6  # per second, of training images that are JPEGs: where there is nothing to measure
_VALUES = 100e6  # per second, of latents, likewise

Read = Callable[[np.ndarray, int, int, Tensor], Tensor]


def reading_rate(data: DataConfig, pixels: int, values: int) -> tuple[float, bool]:
    """Return the images per second that one worker reads, and whether that was measured.

    Images of the most frequent size are read for half a second. Where the shards are not here, or
    not the cache of latents that the run names, it is a typical rate for training images of so many
    ``pixels``, or latents of so many ``values``. Raises InputError for damaged files.
    """
    there = (data.shards / MANIFEST).is_file() and not data.stream
    if there and (data.latents is None or (data.latents / LATENTS).is_file()):
        samples = ShardSet.open(data.shards).split(data.train_split)
        return _measure(samples, data), True
    return (_PIXELS / pixels if data.latents is None else _VALUES / values), False


def _measure(samples: Split, data: DataConfig) -> float:
    buckets = split_buckets(samples, data)
    (height, width), members = max(
        zip(buckets.sizes, buckets.members, strict=True), key=lambda pair: len(pair[1])
    )
    read: Read = ImageReader(samples, buckets, data)
    if data.latents is not None:
        cache = LatentCache(data.latents, read_latents(data.latents))
        read = cache.split(data.train_split, samples.shard, data.flip)
    spread = members[:: math.ceil(len(members) / (_BATCH * _BATCHES))]
    batches = [spread[start : start + _BATCH] for start in range(0, len(spread), _BATCH)]
    for batch in batches:  # the reader may keep the images of a small set, as it does in training
        read(batch, height, width, rng.fold(0, 0))
    images, turn, began = 0, 0, time.perf_counter()
    while time.perf_counter() < began + _SECONDS:
        batch = batches[turn % len(batches)]
        read(batch, height, width, rng.fold(0, turn))
        images, turn = images + len(batch), turn + 1
    return images / (time.perf_counter() - began)
