"""Plan → batches: images decoded and brought to one size per batch.

They are bytes until they are where they are used: a quarter of what float32 takes between processes and on the way to a GPU.

Shape letters: b micro-batch · C colours · H, W image.
"""

from __future__ import annotations

import math
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
from r2id.data.plan import Batch, Buckets, check_batch, make_buckets, plan_epoch, rank_share
from r2id.data.records import View, decode_view
from r2id.data.shards import ShardSet, Split
from r2id.errors import WorkError
from r2id.images import to_float

_KEPT_BYTES = 256 << 20

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
    """For every step from ``start_step`` to ``total_steps``: this rank's micro-batches of that step.

    Each is ``{"image": uint8 [b, C, H, W] (see r2id.images.to_float), "label": int64 [b] (−1: none), "index": int64 [b],
    "epoch": int, "step": int, "keys": list[str]}``, and of sets that have them "attributes": int8 [b, A], −1 or 1, and of
    sets opened with them "embedding": float16 [b, D] or [b, T, D]. What a step holds depends on the data, the seed and
    ``batch`` alone.
    Raises InputError for an unknown split or a batch that does not divide by processes and micro-batch.
    """
    samples = shards.split(split)
    schedule = Schedule.of(samples, data, shards.digest, seed, batch, micro_batch, rank, world_size)
    steps = Steps(schedule, samples, "image", ImageReader(samples, schedule.buckets, data))
    return load_items(steps, range(start_step, total_steps), data.workers)


def eval_loader(
    shards: ShardSet,
    data: DataConfig,
    split: str,
    batch: int,
    limit: int | None = None,
    indices: Sequence[int] | np.ndarray | None = None,
) -> Iterator[MicroBatch]:
    """Every image of a split once, as image_loader's micro-batches (epoch and step 0), but float32 in [−1, 1].

    In the order of the index, except that images of one size come together; a size's last batch may be smaller.
    Images are brought to the sizes they have in training, but never mirrored or reduced to a window. ``limit`` takes that
    many, evenly spaced; ``indices`` those.
    """
    samples = shards.split(split)
    data = data.model_copy(update={"window": None, "flip": False})
    buckets = split_buckets(samples, data)
    chosen = np.arange(len(samples)) if indices is None else np.asarray(indices, dtype=np.int64)
    if limit is not None and limit < len(chosen):
        chosen = chosen[np.arange(limit) * len(chosen) // limit]
    batches = Batches(
        _by_size(chosen, buckets, batch), samples, ImageReader(samples, buckets, data)
    )
    loaded = load_items(batches, range(len(batches.batches)), data.workers)
    return ({**part, "image": to_float(part["image"])} for part in loaded)


def image_sizes(shards: ShardSet, data: DataConfig, split: str) -> list[tuple[int, int]]:
    """The size (height, width) of every image of a split as the model sees it, from the smallest area to the largest."""
    buckets = split_buckets(shards.split(split), data)
    counted = sorted(
        zip(buckets.sizes, buckets.members, strict=True),
        key=lambda pair: (pair[0][0] * pair[0][1], pair[0]),
    )
    return [size for size, members in counted for _ in members]


def split_buckets(samples: Split, data: DataConfig) -> Buckets:
    """The size that every image of a split is brought to."""
    return _split_buckets(samples, data.size, data.max_pixels, data.window)


@lru_cache(maxsize=4)
def _split_buckets(
    samples: Split, size: tuple[int, int] | None, max_pixels: int, window: tuple[int, int] | None
) -> Buckets:
    return make_buckets(samples.height, samples.width, size, max_pixels, window)


class ImageReader:
    """Samples → image tensors. A split that is small as decoded pixels is decoded once and kept."""

    def __init__(
        self,
        samples: Split,
        buckets: Buckets,
        data: DataConfig,
        fetch: Callable[[int], bytes] | None = None,
    ) -> None:
        """``fetch`` gives a sample's stored bytes; none reads them from the shards."""
        self.samples, self.data, self.fetch = samples, data, fetch or samples.read
        pixels = int((buckets.height.astype(np.int64) * buckets.width).sum())
        small = pixels * data.channels <= _KEPT_BYTES and not data.window
        self._kept: dict[int, np.ndarray] | None = {} if small else None

    def __call__(
        self, indices: np.ndarray, height: int, width: int, key: Tensor | None = None
    ) -> Tensor:
        """uint8 [b, C, H, W]. Windows and mirroring are drawn from ``key`` and the index; none takes the
        middle, as it is."""
        draws = np.full((len(indices), 3), 0.5)
        if key is not None and (self.data.window or self.data.flip):
            draws = rng.uniform(
                rng.fold(key, torch.from_numpy(indices.astype(np.int64))), 3
            ).numpy()
        pixels = np.stack(
            [
                self._pixels(int(index), height, width, draw)
                for index, draw in zip(indices, draws, strict=True)
            ]
        )
        return torch.from_numpy(pixels).movedim(-1, 1).contiguous()

    def _pixels(self, index: int, height: int, width: int, draw: np.ndarray) -> np.ndarray:
        """uint8 [H, W, C]; an image's size is the same every time."""
        if self._kept is None:
            array = self._decode(index, height, width, draw)
        elif index in self._kept:
            array = self._kept[index]
        else:
            array = self._kept[index] = self._decode(index, height, width, draw)
        return array[:, ::-1] if self.data.flip and draw[2] < 0.5 else array

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
                f"{self.samples.files[self.samples.shard[index]]}: sample {self.samples.key(index)}: "
                f"{error}: r2id verify tells more"
            ) from None


@dataclass
class Schedule:
    """Step → this rank's part of the plan. Step s belongs to epoch s // (batches per epoch)."""

    buckets: Buckets
    digest: str
    seed: int
    batch: int
    micro_batch: int
    rank: int
    world_size: int
    batch_pixels: int | None
    shard: np.ndarray | None
    """Of each sample, where the order is to go through a few shards at a time."""

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
    ) -> Schedule:
        """InputError for a batch that does not divide by processes and micro-batch."""
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
        """(epoch, micro-batches)."""
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
        micro_batch = self.micro_batch * (len(whole.indices) // self.batch)
        shares = rank_share(whole.indices, self.rank, self.world_size, micro_batch)
        return epoch, [Batch(share, whole.height, whole.width) for share in shares]


@dataclass
class Steps(Dataset):
    """Step number → list of micro-batches. ``read(indices, height, width, key)`` makes the tensor called ``name``."""

    schedule: Schedule
    samples: Split
    name: str
    read: Callable[[np.ndarray, int, int, Tensor], Tensor]

    def __getitem__(self, step: int) -> list[MicroBatch]:
        epoch, parts = self.schedule.at(step)
        key = rng.fold(self.schedule.seed, epoch)
        return [
            {
                self.name: self.read(part.indices, part.height, part.width, key),
                **describe(self.samples, part.indices, epoch, step),
            }
            for part in parts
        ]


@dataclass
class Batches(Dataset):
    """Number → one evaluation batch."""

    batches: list[Batch]
    samples: Split
    read: ImageReader

    def __getitem__(self, number: int) -> MicroBatch:
        part = self.batches[number]
        return {
            "image": self.read(part.indices, part.height, part.width),
            **describe(self.samples, part.indices, 0, 0),
        }


def describe(samples: Split, indices: np.ndarray, epoch: int, step: int) -> MicroBatch:
    """All of a micro-batch but its pixels or latents."""
    told = {
        name: torch.from_numpy(values[indices])
        for name in ("attributes", "embedding")
        if (values := getattr(samples, name)) is not None
    }
    return {
        "label": torch.from_numpy(samples.label[indices].astype(np.int64)),
        **told,
        "index": torch.from_numpy(indices.astype(np.int64)),
        "epoch": epoch,
        "step": step,
        "keys": [samples.key(index) for index in indices],
    }


def load_items(dataset: Dataset, numbers: range | None, workers: int) -> Iterator[Any]:
    """The dataset's items of these numbers, in order, made ahead by ``workers`` processes (0: none)."""
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    try:
        yield from loader
    except WorkError as error:
        # A worker's error comes with its traceback as its message; the last line is the message that it had.
        raise WorkError(
            str(error).strip().splitlines()[-1].removeprefix("r2id.errors.WorkError: ")
        ) from None


def _by_size(chosen: np.ndarray, buckets: Buckets, batch: int) -> list[Batch]:
    heights, widths = buckets.height[chosen], buckets.width[chosen]
    batches = []
    for height, width in buckets.sizes:
        members = chosen[(heights == height) & (widths == width)]
        batches += [
            Batch(members[start : start + batch], height, width)
            for start in range(0, len(members), batch)
        ]
    return batches
