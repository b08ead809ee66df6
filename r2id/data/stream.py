"""Stream whole shards with webdataset, from a folder or an address: an alternative to the loader.

It is meant for stores that are slow at single reads, such as object stores. The manifest and
indexes must be on disk (``fetch_index`` copies them), because they hold the number and the sizes of
the samples. Streaming guarantees less than the indexed loader (r2id.data.loader):

* The order depends on the number of processes and workers, and is only as random as webdataset's:
  shards are shuffled in every epoch, samples within a buffer of some hundred.
* Each process streams its own share of the shards at its own pace. Within an epoch of the whole job
  a sample may occur twice or not at all; over several epochs none is left out.
* Processes draw sizes independently, so one step may have different sizes on different ranks, and
  with ``data.batch_pixels`` different numbers of images. Each image of a step counts alike.
* A resumed run begins a fresh pass over the shards.

It still guarantees that every process makes the same number of steps, with the same number of
micro-batches, so that no rank waits for ever. A shard whose connection breaks is opened again, and
read on from the sample after the last. A shard that is cut short, which webdataset itself would
take for a smaller one, or that differs from its index is an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import get_args

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from r2id import rng
from r2id.config import DataConfig
from r2id.config.batch_split import check_batch
from r2id.data.epoch_plan import count_copies
from r2id.data.loader import ImageReader, MicroBatch, batch_metadata, load_items, split_buckets
from r2id.data.manifest import MANIFEST, parse_manifest
from r2id.data.records import Extension
from r2id.data.remote import Attempts, open_stream, read_file
from r2id.data.shards import ShardSet, Split
from r2id.errors import InputError, WorkError
from r2id.files import atomic_file, sha256_file, write_atomic
from r2id.progress import track

_BUFFER = 500  # samples to shuffle, not decoded yet
_IMAGES = get_args(Extension)
_OTHERS = "holds other samples than its index says"


def stream_loader(
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
    """Yield micro-batches as r2id.data.loader.image_loader does, but in this module's order.

    ``shards`` must be opened with an address. Raises InputError for a batch that is not a multiple
    of processes × micro-batch, or when there are fewer shards than loader processes.
    """
    check_batch(batch, world_size, micro_batch)
    samples = shards.split(split)
    readers = world_size * max(1, data.workers)
    if len(samples.entries) < readers:
        raise InputError(
            f"data.stream: split {split!r} has {len(samples.entries)} shards for {readers} loader "
            "processes: use fewer data.workers, or prepare with a smaller shard_mb"
        )
    stream = Stream(samples, data, batch, micro_batch, (seed, start_step), rank, world_size)
    return islice(load_items(stream, None, data.workers), total_steps - start_step)


def fetch_index(address: str, out: Path) -> ShardSet:
    """Copy a shard set's manifest and indexes: all that streaming needs on disk.

    Raises InputError when there is no shard set at the address or ``out`` holds another one, and
    WorkError when the address cannot be read.
    """
    content = read_file(address, MANIFEST)
    manifest = parse_manifest(content, f"{address}/{MANIFEST}")
    if (out / MANIFEST).exists() and (out / MANIFEST).read_bytes() != content:
        raise InputError(f"out {out}: holds another shard set: choose another folder")
    entries = [entry for split in manifest.splits.values() for entry in split.shards]
    for entry in track(entries, "index", unit="shards"):
        path = out / entry.index_file
        if path.is_file() and sha256_file(path) == entry.index_sha256:
            continue
        with atomic_file(path) as file:
            file.write(read_file(address, entry.index_file))
        if sha256_file(path) != entry.index_sha256:
            raise WorkError(
                f"{address}/{entry.index_file}: damaged: its hash is not the manifest's"
            )
    write_atomic(out / MANIFEST, content)
    return ShardSet.open(out, address)


class Stream(IterableDataset):
    """Yields steps of this rank without end, from this loader process's share of the shards."""

    def __init__(
        self,
        samples: Split,
        data: DataConfig,
        batch: int,
        micro_batch: int,
        rng_keys: tuple[int, int],
        rank: int,
        world_size: int,
    ) -> None:
        assert samples.address, "the tars are streamed from an address"
        self.samples, self.data, self.rng_keys, self.rank, self.world_size = (
            samples,
            data,
            rng_keys,
            rank,
            world_size,
        )
        self.micro_batches = batch // (world_size * micro_batch)
        self.buckets = split_buckets(samples, data)
        sizes = self.buckets.batch_sizes(batch, data.batch_pixels)
        self.share = {
            size: count // world_size for size, count in zip(self.buckets.sizes, sizes, strict=True)
        }

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        # Every bucket collects samples until they fill this rank's part of a step.
        fetched: dict[int, bytes] = {}
        read = ImageReader(self.samples, self.buckets, self.data, fetched.__getitem__)
        waiting: dict[tuple[int, int], list[int]] = {size: [] for size in self.buckets.sizes}
        for epoch, index, image in self._samples():
            size = int(self.buckets.height[index]), int(self.buckets.width[index])
            fetched[index] = image
            waiting[size].append(index)
            if len(waiting[size]) == self.share[size]:
                whole = np.array(waiting[size], dtype=np.int64)
                parts, copies = (
                    values.reshape(self.micro_batches, -1)
                    for values in (whole, count_copies(whole))
                )
                rng_key = rng.fold(*self.rng_keys, epoch)
                yield [
                    {
                        "image": read(part, *size, rng_key),
                        **batch_metadata(self.samples, part, before),
                    }
                    for part, before in zip(parts, copies, strict=True)
                ]
                for index in waiting[size]:
                    fetched.pop(index, None)
                waiting[size] = []

    def _samples(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield (epoch, index, image bytes) without end, in passes over this process's shards."""
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.rank * readers + reader
        epoch = 0
        while True:
            order = rng.subset(
                rng.fold(*self.rng_keys, epoch),
                len(self.samples.entries),
                len(self.samples.entries),
            )
            shards = order[mine :: self.world_size * readers].tolist()
            shuffled = wds.filters.shuffle(
                _BUFFER, initial=_BUFFER // 2, rng=random.Random(f"{self.rng_keys} {epoch} {mine}")
            )
            yield from ((epoch, index, image) for index, image in shuffled(self._read(shards)))
            epoch += 1

    def _read(self, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
        """Yield (index, image bytes) of every sample of these shards, in the order of the tars."""
        address = str(self.samples.address)
        for number in numbers:
            file, members = self.samples.entries[number].file, self.samples.indices_in_shard(number)
            attempts = Attempts(address, file)
            count = 0  # samples read from this shard, in all attempts
            while count < len(members):
                before = count
                try:
                    for place, (key, image) in enumerate(_samples_of(address, file)):
                        if place == len(members) or key != self.samples.key(members[place]):
                            raise WorkError(f"{attempts.where}: {_OTHERS}")
                        if place == count:
                            yield int(members[count]), image
                            count += 1
                    if count < len(members):
                        raise EOFError(f"cut short: {count} of {len(members)} samples")
                except WorkError:
                    raise
                except Exception as error:  # tarfile, webdataset and every store raise their own
                    attempts.failed(error, further=count > before)


def _samples_of(address: str, file: str) -> Iterator[tuple[str, bytes]]:
    """Yield (key, image bytes) of a shard's samples, up to one without its image."""
    with open_stream(address, file) as stream:
        for sample in group_by_keys(tar_file_expander([{"url": file, "stream": stream}])):
            image = next((sample[ext] for ext in _IMAGES if ext in sample), None)
            if image is None:
                return  # the tar ends inside a sample
            yield sample["__key__"], image
