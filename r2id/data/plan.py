"""Which samples make up each step: pure functions of the sizes of all images, a seed and the epoch.

Every process computes the same plan, so ranks agree on the number and the shape of steps, the order does not depend on
how many processes or workers there are, and to resume is to know a step's number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from r2id import rng
from r2id.errors import InputError

_COMMON = 64
"""A bucket is kept apart for a closer fit only when it has this many samples: completing its last batch costs some."""
_COMMON_SHARE = 0.01
_ALIKE = 1.125
"""Sizes within this ratio, in height and in width, share a bucket at the smallest of them."""
_APART = 2.0
"""Sizes further apart than this never share one, however few they are."""
_SHARDS_AT_A_TIME = 16
_SHARD_KEY = 1 << 40  # apart from the numbers of buckets


@dataclass(frozen=True)
class Batch:
    """Samples of one step, all to be brought to one size. ``indices`` is int64 [batch]."""

    indices: np.ndarray
    height: int
    width: int


@dataclass(frozen=True)
class Buckets:
    """The size that training brings each image to. ``height`` and ``width`` are [N]; ``members`` lists the indices of
    each distinct size, ``sizes`` those sizes."""

    height: np.ndarray
    width: np.ndarray
    sizes: list[tuple[int, int]]
    members: list[np.ndarray]

    def batch_sizes(self, batch: int, batch_pixels: int | None = None) -> list[int]:
        """Samples in a step of each size: ``batch``, or as many times that as keep within ``batch_pixels`` and the bucket
        has samples for. A whole number of times, so that every step divides by processes and micro-batches alike."""
        allowed = [(batch_pixels or 0) // (batch * height * width) for height, width in self.sizes]
        return [
            batch * max(1, min(times, len(members) // batch))
            for times, members in zip(allowed, self.members, strict=True)
        ]

    def batches(self, batch: int, batch_pixels: int | None = None) -> int:
        """Steps of one epoch."""
        needed = self.batch_sizes(batch, batch_pixels)
        return sum(
            -(-len(members) // size) for members, size in zip(self.members, needed, strict=True)
        )

    def repeats(self, batch: int, batch_pixels: int | None = None) -> int:
        """Samples of one epoch that are drawn a second time, to complete the last batch of each bucket."""
        needed = self.batch_sizes(batch, batch_pixels)
        return sum(-len(members) % size for members, size in zip(self.members, needed, strict=True))


def make_buckets(
    heights: np.ndarray,
    widths: np.ndarray,
    size: tuple[int, int] | None,
    max_pixels: int,
    window: tuple[int, int] | None = None,
) -> Buckets:
    """Assign every image, of heights [N] and widths [N], a size to be brought to.

    With ``size`` that is the size of all. Without, an image keeps its own, or when it has more than ``max_pixels`` is
    shrunk to that area in the same shape, and of that at most a ``window`` is used; then rare sizes join similar ones. An
    image's bucket is never larger than the image, in height or in width.
    """
    if size is not None:
        heights, widths = np.full_like(heights, size[0]), np.full_like(widths, size[1])
    else:
        heights, widths = _cap_area(heights, widths, max_pixels)
        if window is not None:
            heights, widths = np.minimum(heights, window[0]), np.minimum(widths, window[1])
        distinct, inverse, counts = np.unique(
            _join(heights, widths), return_inverse=True, return_counts=True
        )
        heights, widths = _merge(np.stack(_part(distinct)), counts)[:, inverse]
    distinct, inverse, counts = np.unique(
        _join(heights, widths), return_inverse=True, return_counts=True
    )
    sizes = list(zip(*(sides.tolist() for sides in _part(distinct)), strict=True))
    members = np.split(np.argsort(inverse, kind="stable"), np.cumsum(counts)[:-1])
    return Buckets(heights, widths, sizes, members)


def plan_epoch(
    buckets: Buckets,
    *,
    digest: str,
    seed: int,
    epoch: int,
    batch: int,
    batch_pixels: int | None = None,
    shard: np.ndarray | None = None,
) -> list[Batch]:
    """The global batches of one epoch, in order: every sample is in one of them, each is of one size and full.

    A bucket's last batch is completed from the start of the bucket's order in the next epoch. ``digest`` identifies the
    dataset: another one gets another order. With ``shard``, the shard of each sample [N], the order goes through a few
    shards at a time.
    """
    keys = int(digest[:15], 16), seed
    batches = []
    sizes = buckets.batch_sizes(batch, batch_pixels)
    for number, (members, size) in enumerate(zip(buckets.members, sizes, strict=True)):
        needed = -(-len(members) // size) * size
        rounds = -(-needed // len(members))
        order = np.concatenate(
            [_order(members, shard, *keys, epoch + later, number) for later in range(rounds)]
        )
        batches += [
            Batch(part, *buckets.sizes[number]) for part in order[:needed].reshape(-1, size)
        ]
    first = np.array([part.indices[0] for part in batches])
    turns = _permutation(len(batches), *keys, epoch, len(buckets.members))
    return [batches[i] for i in _near(turns, first, shard, *keys, epoch)]


def _order(members: np.ndarray, shard: np.ndarray | None, *keys: int) -> np.ndarray:
    """Members in random order; the last of the keys is the bucket's number."""
    shuffled = members[_permutation(len(members), *keys)]
    return _near(shuffled, np.arange(shuffled.max() + 1), shard, *keys[:-1])


def _near(
    order: np.ndarray, sample: np.ndarray, shard: np.ndarray | None, *keys: int
) -> np.ndarray:
    """An order of things, each of which stands for a sample, brought to where it meets few shards at a time."""
    if shard is None:
        return order
    turn = np.argsort(_permutation(int(shard.max()) + 1, *keys, _SHARD_KEY)) // _SHARDS_AT_A_TIME
    return order[np.argsort(turn[shard[sample[order]]], kind="stable")]


def rank_share(
    indices: np.ndarray, rank: int, world_size: int, micro_batch: int
) -> list[np.ndarray]:
    """This rank's part of a global batch, in micro-batches: every world-size-th sample from the rank-th on."""
    check_batch(len(indices), world_size, micro_batch)
    return list(indices[rank::world_size].reshape(-1, micro_batch))


def check_batch(batch: int, world_size: int, micro_batch: int) -> None:
    """InputError when a batch does not divide evenly."""
    unit = world_size * micro_batch
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        advice = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"train.batch = {batch}: must be a multiple of {world_size} processes × {micro_batch} samples "
            f"each (train.micro_batch), such as {advice}"
        )


def _permutation(count: int, *keys: int) -> np.ndarray:
    return rng.subset(rng.fold(*keys), count, count).numpy()


def _join(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """One number for each size: they sort much faster than pairs."""
    return heights.astype(np.int64) << 32 | widths


def _part(joined: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return joined >> 32, joined & 0xFFFFFFFF


def _cap_area(
    heights: np.ndarray, widths: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink what has more than ``max_pixels``, keeping the shape as far as whole pixels can."""
    scale = np.minimum(1.0, np.sqrt(max_pixels / (heights.astype(np.float64) * widths)))

    def whole(sides: np.ndarray) -> np.ndarray:
        # A side that comes out whole may lie just below, by rounding.
        return np.maximum(1, np.floor(sides * scale + 1e-9)).astype(heights.dtype)

    short = whole(np.minimum(heights, widths))
    long = np.minimum(
        whole(np.maximum(heights, widths)), max_pixels // short
    )  # matters when short would be below 1
    tall = heights >= widths
    return np.where(tall, long, short), np.where(tall, short, long)


def _merge(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Distinct sizes [2, K], each of counts [K] samples → the size [2, K] of the bucket that each goes to.

    Common sizes keep their own. The others are halved in log height or log width, whichever spreads wider, until they
    are alike or too few; a bucket takes the smallest height and width in it, so that nothing is enlarged.
    """
    merged = sizes.copy()
    rare = counts < max(_COMMON, _COMMON_SHARE * counts.sum())
    pending = [np.flatnonzero(rare)] if rare.any() else []
    while pending:
        group = pending.pop()
        low, high = sizes[:, group].min(1).astype(np.int64), sizes[:, group].max(1).astype(np.int64)
        axis = int(np.argmax(high / low))
        spread = high[axis] / low[axis]
        upper = (
            sizes[axis, group].astype(np.int64) ** 2 > low[axis] * high[axis]
        )  # above the middle of the logs
        parts = [group[~upper], group[upper]]
        enough = min(counts[part].sum() for part in parts) >= _COMMON
        if spread > _APART or (spread > _ALIKE and enough):
            pending += parts
        else:
            merged[:, group] = low[:, None]
    return merged
