"""Turn the plan of an epoch into batches: read, decode and resize the images of every step.

Images stay uint8 until they are on the device that uses them. Between loader processes and on the
way to a GPU, they take a quarter of the memory of float32.

Shape letters: b micro-batch · C colours · H, W image.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from r2id import rng
from r2id.config import DataConfig
from r2id.config.batch_split import check_batch
from r2id.data.epoch_plan import (
    Batch,
    Buckets,
    count_copies,
    make_buckets,
    plan_epoch,
    rank_micro_batches,
)
from r2id.data.loader_signals import ignore_stop_signals, signals_held, tells_of_killed_loader
from r2id.data.records import View, decode_view
from r2id.data.shards import ShardSet, Split
from r2id.errors import LOADER_KILLED, WorkError
from r2id.images import to_float
from r2id.parent_process import exit_with_parent

_KEPT_BYTES = 256 << 20  # a split whose decoded pixels take less is kept in memory, decoded
_MIRRORED = 0.5  # share of the images that data.flip mirrors

MicroBatch = dict[str, Any]


def image_loader(
    shards: ShardSet,
    data: DataConfig,
    *,
    split: str,
    batch: int,
    micro_batch: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[MicroBatch]]:
    """Yield this rank's micro-batches of every step from ``start_step`` to ``total_steps``.

    A micro-batch is a dictionary of

    * ``"image"``: uint8 [b, C, H, W]; see r2id.images.to_float
    * ``"label"``: int64 [b], −1 where there is none
    * ``"attributes"``: int8 [b, A], −1 or 1, if the set has them
    * ``"embedding"``: float16 [b, D] or [b, T, D], if the set was opened with embeddings
    * ``"index"``: int64 [b], positions in the split, and ``"sample_ids"``: the samples' keys
    * ``"draw"``: int64 [b], what random numbers are keyed by: positions, and other numbers for a
      sample that the step has already

    What a step holds depends only on the data, the seed and ``batch``, not on the number of
    processes. Raises InputError for an unknown split, or a batch that is not a multiple of
    processes × micro-batch.
    """
    samples = shards.split(split)
    plan = RankPlan.of(samples, data, shards.digest, seed, batch, micro_batch, rank, world_size)
    steps = StepDataset(plan, samples, "image", ImageReader(samples, plan.buckets, data))
    return load_items(steps, range(start_step, total_steps), data.workers)


def eval_loader(
    shards: ShardSet,
    data: DataConfig,
    split: str,
    batch: int,
    limit: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
    as_float: bool = True,
) -> Iterator[MicroBatch]:
    """Yield every image of a split once, in batches as image_loader's, but float32 in [−1, 1].

    Images are grouped by size, and ordered as in the index within a size, whose last batch may be
    smaller. They have the sizes that they have in training, but are never mirrored or cut to a
    window. ``indices`` selects samples; ``limit`` is the largest number of them, evenly spaced.
    Without ``as_float`` images are uint8.
    """
    samples = shards.split(split)
    data = data.model_copy(update={"window": None, "flip": False})
    buckets = split_buckets(samples, data)
    chosen = np.arange(len(samples)) if indices is None else np.asarray(indices, dtype=np.int64)
    if limit is not None and limit < len(chosen):
        chosen = chosen[np.arange(limit) * len(chosen) // limit]
    batches = EvalDataset(
        _by_size(chosen, buckets, batch), samples, ImageReader(samples, buckets, data)
    )
    loaded = load_items(batches, range(len(batches.batches)), data.workers)
    if not as_float:
        return loaded
    return ({**part, "image": to_float(part["image"])} for part in loaded)


def image_sizes(shards: ShardSet, data: DataConfig, split: str) -> list[tuple[int, int]]:
    """Return the training size (height, width) of every image of a split, by increasing area."""
    buckets = split_buckets(shards.split(split), data)
    counted = sorted(
        zip(buckets.sizes, buckets.members, strict=True),
        key=lambda pair: (pair[0][0] * pair[0][1], pair[0]),
    )
    return [size for size, members in counted for _ in members]


def split_buckets(samples: Split, data: DataConfig) -> Buckets:
    """Return the buckets of a split: the size that every image is resized to."""
    return _split_buckets(samples, data.size, data.max_pixels, data.window)


@lru_cache(maxsize=4)
def _split_buckets(
    samples: Split, size: tuple[int, int] | None, max_pixels: int, window: tuple[int, int] | None
) -> Buckets:
    return make_buckets(samples.height, samples.width, size, max_pixels, window)


class ImageReader:
    """Reads samples as image tensors, and keeps the decoded images of small splits in memory."""

    def __init__(
        self,
        samples: Split,
        buckets: Buckets,
        data: DataConfig,
        fetch: Callable[[int], bytes] | None = None,
    ) -> None:
        """``fetch`` returns a sample's stored bytes; by default they are read from the shards."""
        self.samples, self.data, self.fetch = samples, data, fetch or samples.read
        pixels = int((buckets.height.astype(np.int64) * buckets.width).sum())
        small = pixels * data.channels <= _KEPT_BYTES and not data.window
        self._kept: dict[int, np.ndarray] | None = {} if small else None

    def __call__(
        self, indices: np.ndarray, height: int, width: int, rng_key: Tensor | None = None
    ) -> Tensor:
        """Read images as uint8 [b, C, H, W].

        Windows and mirroring are drawn from ``rng_key`` and each sample's index, not from its
        position in the batch, so that an image is the same for any number of processes. Without a
        key, windows are centred and nothing is mirrored.
        """
        # For each image: vertical and horizontal position of the window, and whether to mirror.
        draws = np.full((len(indices), 3), 0.5)
        if rng_key is not None and (self.data.window or self.data.flip):
            draws = _draws(rng_key, indices)
        pixels = np.stack(
            [
                self._pixels(int(index), height, width, draw)
                for index, draw in zip(indices, draws, strict=True)
            ]
        )
        return torch.from_numpy(pixels).movedim(-1, 1).contiguous()

    def _pixels(self, index: int, height: int, width: int, draw: np.ndarray) -> np.ndarray:
        """Decode one image to uint8 [H, W, C]."""
        # An index is key enough for kept images: without windows, their size never changes.
        if self._kept is None:
            array = self._decode(index, height, width, draw)
        elif index in self._kept:
            array = self._kept[index]
        else:
            array = self._kept[index] = self._decode(index, height, width, draw)
        return array[:, ::-1] if self.data.flip and draw[2] < _MIRRORED else array

    def _decode(self, index: int, height: int, width: int, draw: np.ndarray) -> np.ndarray:
        scale, place = None, (0.5, 0.5)
        if self.data.window:
            area = int(self.samples.height[index]) * int(self.samples.width[index])
            scale, place = (
                min(1.0, math.sqrt(self.data.max_pixels / area)),
                (float(draw[0]), float(draw[1])),
            )
        try:
            return decode_view(
                self.fetch(index), self.data.channels, View(height, width, scale, place)
            )
        except ValueError as error:
            raise WorkError(
                f"{self.samples.files[self.samples.shard[index]]}: "
                f"sample {self.samples.key(index)}: {error}: r2id verify tells more"
            ) from None


def mirrored(rng_key: Tensor, indices: np.ndarray) -> np.ndarray:
    """Which samples ImageReader mirrors: indices [b] → bool [b]."""
    return _draws(rng_key, indices)[:, 2] < _MIRRORED


def _draws(rng_key: Tensor, indices: np.ndarray) -> np.ndarray:
    """Draw the window's vertical and horizontal position, and whether to mirror → [b, 3]."""
    return rng.uniform(rng.fold(rng_key, torch.from_numpy(indices.astype(np.int64))), 3).numpy()


@dataclass
class RankPlan:
    """This rank's part of the epoch plans: which samples it processes in each step.

    Step s belongs to epoch s // (batches per epoch), so resuming a run takes only a step number.
    """

    buckets: Buckets
    digest: str
    seed: int
    batch: int
    micro_batch: int
    rank: int
    world_size: int
    batch_pixels: int | None
    shard: np.ndarray | None
    """The shard of each sample, when the order is to visit a few shards at a time; else None."""

    @classmethod
    def of(
        cls,
        samples: Split,
        data: DataConfig,
        digest: str,
        seed: int,
        batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
    ) -> RankPlan:
        """Make the plan; InputError when processes and micro-batch do not divide the batch."""
        check_batch(batch, world_size, micro_batch)
        return cls(
            split_buckets(samples, data),
            digest,
            seed,
            batch,
            micro_batch,
            rank,
            world_size,
            data.batch_pixels,
            samples.shard if data.shuffle == "shards" else None,
        )

    def __post_init__(self) -> None:
        self.batches_per_epoch = self.buckets.batches(self.batch, self.batch_pixels)
        self._planned: tuple[int, list[Batch]] = (-1, [])

    def at(self, step: int) -> tuple[int, list[Batch]]:
        """Return the epoch of a step and this rank's micro-batches in it."""
        epoch, position = divmod(step, self.batches_per_epoch)
        if self._planned[0] != epoch:
            self._planned = (
                epoch,
                plan_epoch(
                    self.buckets,
                    digest=self.digest,
                    seed=self.seed,
                    epoch=epoch,
                    batch=self.batch,
                    batch_pixels=self.batch_pixels,
                    shard=self.shard,
                ),
            )
        whole = self._planned[1][position]
        # Steps of small images hold a multiple of ``batch`` samples (see Buckets.batch_sizes); the
        # number of micro-batches stays the same.
        micro_batch = self.micro_batch * (len(whole.indices) // self.batch)
        indices, copies = (
            rank_micro_batches(values, self.rank, self.world_size, micro_batch)
            for values in (whole.indices, count_copies(whole.indices))
        )
        size = whole.height, whole.width
        return epoch, [Batch(i, *size, c) for i, c in zip(indices, copies, strict=True)]


@dataclass
class StepDataset(Dataset):
    """Maps a step number to its micro-batches.

    ``read(indices, height, width, rng_key)`` returns the tensor that each micro-batch holds under
    ``name``: images or latents.
    """

    plan: RankPlan
    samples: Split
    name: str
    read: Callable[[np.ndarray, int, int, Tensor], Tensor]

    def __getitem__(self, step: int) -> list[MicroBatch]:
        epoch, parts = self.plan.at(step)
        rng_key = rng.fold(self.plan.seed, epoch)
        return [
            {
                self.name: self.read(part.indices, part.height, part.width, rng_key),
                **batch_metadata(self.samples, part.indices, part.copies),
            }
            for part in parts
        ]


@dataclass
class EvalDataset(Dataset):
    """Maps the number of an evaluation batch to its content."""

    batches: list[Batch]
    samples: Split
    read: ImageReader

    def __getitem__(self, number: int) -> MicroBatch:
        part = self.batches[number]
        return {
            "image": self.read(part.indices, part.height, part.width),
            **batch_metadata(self.samples, part.indices),
        }


def batch_metadata(samples: Split, indices: np.ndarray, copies: np.ndarray | int = 0) -> MicroBatch:
    """Return a micro-batch's fields other than its pixels or latents; ``copies``: see Batch."""
    optional = {
        name: torch.from_numpy(values[indices])
        for name in ("attributes", "embedding")
        if (values := getattr(samples, name)) is not None
    }
    return {
        "label": torch.from_numpy(samples.label[indices].astype(np.int64)),
        **optional,
        "index": torch.from_numpy(indices.astype(np.int64)),
        "draw": torch.from_numpy(indices.astype(np.int64) + len(samples) * copies),
        "sample_ids": [samples.key(index) for index in indices],
    }


def load_items(dataset: Dataset, numbers: range | None, workers: int) -> Iterator[Any]:
    """Yield a dataset's items in order, loaded ahead by ``workers`` processes (0: by this one).

    ``numbers`` are the items to load; None is for iterable datasets.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
        # A fork shares what is mapped or kept in memory. Python 3.14 would send it all to workers.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    try:
        with signals_held():
            items = iter(loader)  # starts the processes
        yield from items
    except WorkError as error:
        # torch puts a worker's whole traceback into the message; its last line is the original.
        raise WorkError(
            str(error).strip().splitlines()[-1].removeprefix("r2id.errors.WorkError: ")
        ) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if tells_of_killed_loader(error):
            raise WorkError(LOADER_KILLED) from None
        raise


def _begin_worker(_number: int) -> None:
    ignore_stop_signals()
    exit_with_parent()  # torch's own watch is blind while an item is loaded


def _by_size(chosen: np.ndarray, buckets: Buckets, batch: int) -> list[Batch]:
    """Divide samples into batches of one size each."""
    heights, widths = buckets.height[chosen], buckets.width[chosen]
    batches = []
    for height, width in buckets.sizes:
        members = chosen[(heights == height) & (widths == width)]
        batches += [
            Batch(members[start : start + batch], height, width)
            for start in range(0, len(members), batch)
        ]
    return batches
