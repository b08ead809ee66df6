"""The second way in: shards streamed by plain webdataset, from a folder or an address, tar after tar.

For stores that answer slowly to single reads, or where webdataset's habits are wanted. Beside the address it needs the
set's manifest and indexes on disk (fetch_index gets them), which say how many samples there are, of which sizes. It
promises less than the indexed loader (r2id.data.loader):

* the order depends on the number of processes and workers, and is as random as webdataset's: shards are shuffled anew in
  every epoch, samples within a buffer of some hundred;
* each process sees the shards of its own share in an epoch, which it passes through at its own pace: over an epoch of the
  job a sample may be met twice or, until a later one, not at all; nothing is left out for good;
* processes draw sizes independently, so that in one step they may work on different ones;
* a resumed run begins a fresh pass instead of going on where it was.

What it keeps: every process makes exactly as many steps, of as many micro-batches; a shard that is cut short or of other
content than the index says is an error.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.tariterators import group_by_keys, tar_file_expander

from r2id import rng
from r2id.config import DataConfig
from r2id.data.loader import ImageReader, MicroBatch, describe, load_items, split_buckets
from r2id.data.manifest import MANIFEST, parse_manifest
from r2id.data.plan import check_batch
from r2id.data.records import Extension
from r2id.data.remote import open_stream, read_file
from r2id.data.shards import ShardSet, Split
from r2id.errors import InputError, WorkError
from r2id.files import atomic_file, sha256_file, write_atomic
from r2id.progress import track

_BUFFER = 500  # samples, undecoded
_IMAGES = get_args(Extension)


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
    """As r2id.data.loader.image_loader, with this module's promises. ``shards`` was opened with the address.

    Raises InputError for a batch that does not divide, or when there are fewer shards than loader processes.
    """
    check_batch(batch, world_size, micro_batch)
    samples = shards.split(split)
    readers = world_size * max(1, data.workers)
    if len(samples.entries) < readers:
        raise InputError(
            f"data.stream: split {split!r} has {len(samples.entries)} shards for {readers} loader processes: "
            "use fewer data.workers, or prepare with a smaller shard_mb"
        )
    stream = Stream(samples, data, batch, micro_batch, (seed, start_step), rank, world_size)
    return _number(load_items(stream, None, data.workers), range(start_step, total_steps))


def fetch_index(address: str, out: Path) -> ShardSet:
    """Copy a shard set's manifest and indexes, which is all that streaming needs on disk.

    InputError when there is no shard set at the address or ``out`` holds another; WorkError when it cannot be read.
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
    """This rank's steps without end, from this loader process's share of the shards."""

    def __init__(
        self,
        samples: Split,
        data: DataConfig,
        batch: int,
        micro_batch: int,
        keys: tuple[int, int],
        rank: int,
        world_size: int,
    ) -> None:
        assert samples.address, "the tars are streamed from an address"
        self.samples, self.data, self.keys, self.rank, self.world_size = (
            samples,
            data,
            keys,
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
        fetched: dict[int, bytes] = {}
        read = ImageReader(self.samples, self.buckets, self.data, fetched.__getitem__)
        waiting: dict[tuple[int, int], list[int]] = {size: [] for size in self.buckets.sizes}
        for epoch, index, image in self._samples():
            size = int(self.buckets.height[index]), int(self.buckets.width[index])
            fetched[index] = image
            waiting[size].append(index)
            if len(waiting[size]) == self.share[size]:
                parts = np.array(waiting[size], dtype=np.int64).reshape(self.micro_batches, -1)
                key = rng.fold(*self.keys, epoch)
                yield [
                    {"image": read(part, *size, key), **describe(self.samples, part, epoch, 0)}
                    for part in parts
                ]
                for index in waiting[size]:
                    fetched.pop(index, None)
                waiting[size] = []

    def _samples(self) -> Iterator[tuple[int, int, bytes]]:
        """(pass, index, image) without end, one pass over the shards after the other."""
        info = get_worker_info()
        reader, readers = (info.id, info.num_workers) if info else (0, 1)
        mine = self.rank * readers + reader
        epoch = 0
        while True:
            order = rng.subset(
                rng.fold(*self.keys, epoch), len(self.samples.entries), len(self.samples.entries)
            )
            shards = order[mine :: self.world_size * readers].tolist()
            shuffled = wds.filters.shuffle(
                _BUFFER, initial=_BUFFER // 2, rng=random.Random(f"{self.keys} {epoch} {mine}")
            )
            yield from ((epoch, index, image) for index, image in shuffled(self._read(shards)))
            epoch += 1

    def _read(self, numbers: list[int]) -> Iterator[tuple[int, bytes]]:
        """(index, image) of every sample of these shards, in the order of the tars."""
        address = self.samples.address
        for number in numbers:
            file, members = self.samples.entries[number].file, self.samples.in_shard(number)
            found = 0
            try:
                with open_stream(str(address), file) as stream:
                    for sample in group_by_keys(
                        tar_file_expander([{"url": file, "stream": stream}])
                    ):
                        if found == len(members) or sample["__key__"] != self.samples.key(
                            members[found]
                        ):
                            raise WorkError(
                                f"{address}/{file}: holds other samples than its index says"
                            )
                        image = next((sample[ext] for ext in _IMAGES if ext in sample), None)
                        if image is None:
                            break  # the tar ends inside a sample
                        yield int(members[found]), image
                        found += 1
            except WorkError:
                raise
            except Exception as error:  # of tarfile, webdataset and every store
                raise WorkError(
                    f"{address}/{file}: cannot be read: {' '.join(str(error).split())}"
                ) from error
            if found != len(members):
                raise WorkError(f"{address}/{file}: cut short: {found} of {len(members)} samples")


def _number(steps: Iterator[list[MicroBatch]], numbers: range) -> Iterator[list[MicroBatch]]:
    for number in numbers:
        step = next(steps)
        for part in step:
            part["step"] = number
        yield step
