"""Plan an epoch: which samples make up each step, as pure functions of image sizes, seed and epoch.

Images keep their aspect ratio, so a batch can only hold images of one size: they are sorted into
buckets, one per training size, and every batch is drawn from one bucket.

Every process computes the same plan without communicating. So ranks agree on the number and shape
of steps, the order does not depend on the number of processes or workers, and a resumed run needs
only its step number.

Shape letters: N samples · K distinct sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from r2id import rng
from r2id.config.batch_split import check_batch

_COMMON, _COMMON_SHARE = 64, 0.01
"""A size with at least this many samples, and this share of all, has a bucket of its own. Rarer
sizes are merged, because every bucket repeats samples to complete its last batch."""
_ALIKE = 1.125
"""Rare sizes within this ratio, in height and in width, share a bucket at the smallest of them."""
_APART = 2.0
"""Rare sizes further apart than this never share a bucket, however few they are."""
_SHARDS_AT_A_TIME = 16  # when data.shuffle is "shards"
_SHARD_KEY = 1 << 40  # an rng key that differs from every bucket's number


@dataclass(frozen=True)
class Batch:
    """The samples of one step, and the size they are resized to."""

    indices: np.ndarray
    """Positions in the split, int64 [batch]."""
    height: int
    width: int
    copies: np.ndarray | int = 0
    """How often the step has each sample already, int64 [batch]: see ``count_copies``."""


@dataclass(frozen=True)
class Buckets:
    """The size that training resizes each image to, and the images of each size.

    ``height`` and ``width`` [N] are the size of each sample. ``sizes`` lists the K distinct sizes,
    and ``members`` holds the sample indices of each of them.
    """

    height: np.ndarray
    width: np.ndarray
    sizes: list[tuple[int, int]]
    members: list[np.ndarray]

    def batch_sizes(self, batch: int, batch_pixels: int | None = None) -> list[int]:
        """Return the number of samples in a step of each size.

        It is ``batch``, or the largest multiple of it whose pixels stay within ``batch_pixels`` and
        for which the bucket has enough samples. A multiple can be divided among processes and
        micro-batches just as ``batch`` can.
        """
        allowed = [(batch_pixels or 0) // (batch * height * width) for height, width in self.sizes]
        return [
            batch * max(1, min(times, len(members) // batch))
            for times, members in zip(allowed, self.members, strict=True)
        ]

    def batches(self, batch: int, batch_pixels: int | None = None) -> int:
        """Return the number of steps in one epoch."""
        needed = self.batch_sizes(batch, batch_pixels)
        return sum(
            -(-len(members) // size) for members, size in zip(self.members, needed, strict=True)
        )

    def repeats(self, batch: int, batch_pixels: int | None = None) -> int:
        """Return how many samples an epoch repeats to complete the last batch of each bucket."""
        needed = self.batch_sizes(batch, batch_pixels)
        return sum(-len(members) % size for members, size in zip(self.members, needed, strict=True))


def make_buckets(
    heights: np.ndarray,
    widths: np.ndarray,
    size: tuple[int, int] | None,
    max_pixels: int,
    window: tuple[int, int] | None = None,
) -> Buckets:
    """Assign a training size to every image of heights [N] and widths [N].

    With ``size`` all images get that size. Otherwise an image keeps its own size, but is shrunk to
    an area of ``max_pixels`` and cut to ``window`` where it is larger. Then rare sizes are merged
    with similar ones. A bucket is never larger than its images in height or width, so that no image
    is enlarged.
    """
    if size is not None:
        heights, widths = np.full_like(heights, size[0]), np.full_like(widths, size[1])
    else:
        heights, widths = _cap_area(heights, widths, max_pixels)
        if window is not None:
            heights, widths = np.minimum(heights, window[0]), np.minimum(widths, window[1])
        distinct, inverse, counts = np.unique(
            _pack_sizes(heights, widths), return_inverse=True, return_counts=True
        )
        heights, widths = _merge_rare_sizes(np.stack(_unpack_sizes(distinct)), counts)[:, inverse]
    distinct, inverse, counts = np.unique(
        _pack_sizes(heights, widths), return_inverse=True, return_counts=True
    )
    sizes = list(zip(*(sides.tolist() for sides in _unpack_sizes(distinct)), strict=True))
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
    """Return the global batches of one epoch, in random order; each has one size and is full.

    Every sample is in at least one batch. A bucket's last batch is completed with the first samples
    of the bucket's order in the next epoch. The order depends on ``digest`` (the dataset's
    identity), ``seed`` and ``epoch``. With ``shard`` [N], the shard number of each sample, it
    visits a few shards at a time, for storage on which random reads are slow.
    """
    rng_keys = int(digest[:15], 16), seed
    batches = []
    sizes = buckets.batch_sizes(batch, batch_pixels)
    for number, (members, size) in enumerate(zip(buckets.members, sizes, strict=True)):
        needed = -(-len(members) // size) * size
        # Usually one epoch's order is enough, or two; a bucket smaller than a batch needs more.
        rounds = -(-needed // len(members))
        order = np.concatenate(
            [_order(members, shard, *rng_keys, epoch + later, number) for later in range(rounds)]
        )
        batches += [
            Batch(part, *buckets.sizes[number]) for part in order[:needed].reshape(-1, size)
        ]
    first = np.array([part.indices[0] for part in batches])
    # The number after the last bucket's makes a key of its own for the order of the batches.
    shuffled = _permutation(len(batches), *rng_keys, epoch, len(buckets.members))
    return [batches[i] for i in _group_by_shards(shuffled, first, shard, *rng_keys, epoch)]


def _order(members: np.ndarray, shard: np.ndarray | None, *rng_keys: int) -> np.ndarray:
    """Shuffle the members of a bucket; the last of the keys is the bucket's number."""
    shuffled = members[_permutation(len(members), *rng_keys)]
    return _group_by_shards(shuffled, np.arange(shuffled.max() + 1), shard, *rng_keys[:-1])


def _group_by_shards(
    order: np.ndarray, sample: np.ndarray, shard: np.ndarray | None, *rng_keys: int
) -> np.ndarray:
    """Sort an order of samples, or of batches, by groups of randomly chosen shards.

    ``sample[i]`` stands for element i of the order: the sample itself, or the first one of a batch.
    Within a group the given random order remains, because the sort is stable.
    """
    if shard is None:
        return order
    # argsort inverts the permutation: it gives each shard its position in the random order.
    position = np.argsort(_permutation(int(shard.max()) + 1, *rng_keys, _SHARD_KEY))
    group = position // _SHARDS_AT_A_TIME
    return order[np.argsort(group[shard[sample[order]]], kind="stable")]


def rank_micro_batches(
    indices: np.ndarray, rank: int, world_size: int, micro_batch: int
) -> list[np.ndarray]:
    """Return this rank's samples of a global batch (every ``world_size``-th), in micro-batches."""
    check_batch(len(indices), world_size, micro_batch)
    return list(indices[rank::world_size].reshape(-1, micro_batch))


def count_copies(indices: np.ndarray) -> np.ndarray:
    """Say of each sample of a step how often it comes before: int64 [batch].

    It does so where a bucket has fewer samples than a batch.
    """
    order = np.argsort(indices, kind="stable")
    place, new = np.arange(len(indices)), np.diff(indices[order], prepend=-1) != 0
    copies = np.empty_like(place)
    copies[order] = place - np.maximum.accumulate(np.where(new, place, 0))
    return copies


def _permutation(count: int, *rng_keys: int) -> np.ndarray:
    return rng.subset(rng.fold(*rng_keys), count, count).numpy()


def _pack_sizes(heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Pack each size into one number: numbers sort much faster than pairs."""
    return heights.astype(np.int64) << 32 | widths


def _unpack_sizes(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return packed >> 32, packed & 0xFFFFFFFF


def _cap_area(
    heights: np.ndarray, widths: np.ndarray, max_pixels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shrink sizes of more than ``max_pixels``, keeping the aspect ratio as whole pixels allow."""
    scale = np.minimum(1.0, np.sqrt(max_pixels / (heights.astype(np.float64) * widths)))

    def whole(sides: np.ndarray) -> np.ndarray:
        # Rounding may leave a side that should be a whole number just below it.
        return np.maximum(1, np.floor(sides * scale + 1e-9)).astype(heights.dtype)

    short = whole(np.minimum(heights, widths))
    # The second limit matters for extreme shapes, whose short side was raised to one pixel.
    long = np.minimum(whole(np.maximum(heights, widths)), max_pixels // short)
    tall = heights >= widths
    return np.where(tall, long, short), np.where(tall, short, long)


def _merge_rare_sizes(sizes: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Map distinct sizes [2, K] with counts [K] to the sizes [2, K] of their buckets.

    Common sizes have buckets of their own. All rare sizes start as one group. A group is split by
    height or by width, until its sizes are alike or its parts would get too small. A bucket takes
    the smallest height and width in its group, so that no image is enlarged.
    """
    merged = sizes.copy()
    rare = counts < max(_COMMON, _COMMON_SHARE * counts.sum())
    pending = [np.flatnonzero(rare)] if rare.any() else []
    while pending:
        group = pending.pop()
        parts = _split_group(sizes[:, group].astype(np.int64), counts[group])
        if parts:
            pending += [group[part] for part in parts]
        else:
            merged[:, group] = sizes[:, group].min(1, keepdims=True)
    return merged


def _split_group(sizes: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Split sizes [2, K] with counts [K] in two → the numbers of each part's; [] to keep them.

    They are split by the side that spreads wider, or else by the other one, as near to the middle
    of its logarithms as leaves enough samples in both parts. Where neither side can be, sizes
    further apart than _APART are split all the same.
    """
    spreads = sizes.max(1) / sizes.min(1)
    for limit, fewest in ((_ALIKE, _COMMON), (_APART, 1)):
        for axis in np.argsort(-spreads, kind="stable"):
            if spreads[axis] <= limit:
                continue
            order = np.argsort(sizes[axis], kind="stable")
            side, below = sizes[axis, order], np.cumsum(counts[order])[:-1]
            enough = np.minimum(below, counts.sum() - below) >= fewest
            enough &= side[:-1] < side[1:]
            if enough.any():
                # The middle is the geometric mean. Squares avoid a root, which may be rounded.
                off = side[:-1] * side[1:] / (side[0] * side[-1])
                first = 1 + int(np.argmin(np.where(enough, np.maximum(off, 1 / off), np.inf)))
                return [order[:first], order[first:]]
    return []
