"""Rates of preparing and loading, and what an index of 1.28 million samples costs.

    python tests/bench/data.py photos FOLDER     images at native sizes: prepare and load them
    python tests/bench/data.py mnist FOLDER      the IDX files into shards, with two workers
    python tests/bench/data.py plan              1.28 million samples: index, buckets, the order of
                                                 an epoch, resuming in the middle of it

Every rate is images per second of wall time; ratios are to bare decoding of the same bytes in the
same run, the best of several rounds each. Its figures are under "Speed and memory" in
tests/bench/README.md.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measure import resident

from data_prep.prepare import prepare
from r2id.config import DataConfig, PrepareConfig
from r2id.data import loader
from r2id.data.epoch_plan import make_buckets, plan_epoch
from r2id.data.loader import image_loader, split_buckets
from r2id.data.manifest import FORMAT_VERSION, Manifest, SplitEntry, shard_file
from r2id.data.records import Record, View, decode_view, encode_png, inspect
from r2id.data.shard_writer import write_shard_files
from r2id.data.shards import ShardSet

ROUNDS = 5


def best(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Shortest of several times in seconds: what is left of noise from others is the least."""
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def photos(source: Path, folder: Path, max_pixels: int) -> None:
    """The bytes lie in the page cache for all of them alike."""
    out = folder / "set"
    shards = ShardSet.open(prepare(PrepareConfig(dataset="folder", source=source, out=out)))
    samples = shards.split("train")
    stored = [samples.read(index) for index in range(len(samples))]
    every = [
        split.read(index)
        for split in map(shards.split, shards.manifest.splits)
        for index in range(len(split))
    ]

    decoding = len(every) / best(lambda: [inspect(data) for data in every])

    def prepare_again() -> None:
        shutil.rmtree(out)
        prepare(PrepareConfig(dataset="folder", source=source, out=out))

    preparing = len(every) / best(prepare_again)
    ratio = preparing / decoding
    print(f"bare decoding {decoding:7.0f}   prepare, 1 worker {preparing:7.0f}   ratio {ratio:.2f}")

    buckets = split_buckets(samples, DataConfig(shards=out, max_pixels=max_pixels))
    loader._KEPT_BYTES = 0  # so few images would be kept decoded
    drawn = [index for part in epoch(shards, 0, max_pixels) for index in part["index"].tolist()]
    work = [
        (stored[index], View(int(buckets.height[index]), int(buckets.width[index])))
        for index in drawn
    ]
    bare = len(work) / best(lambda: [decode_view(data, 3, view) for data, view in work])
    print(f"bare decoding and resizing to at most {max_pixels} pixels {bare:7.0f}")
    for workers in (0, 1, 2):
        rate = load(shards, workers, max_pixels)
        print(f"loader, {workers} workers {rate:7.0f}   ratio {rate / bare:.2f}")


def epoch(
    shards: ShardSet, workers: int, max_pixels: int, epochs: int = 1, batch: int = 16
) -> Iterator[dict[str, Any]]:
    data = DataConfig(shards=shards.folder, channels=3, max_pixels=max_pixels, workers=workers)
    steps = split_buckets(shards.split("train"), data).batches(batch)
    for step in image_loader(
        shards,
        data,
        split="train",
        batch=batch,
        micro_batch=batch,
        seed=0,
        start_step=0,
        total_steps=steps * epochs,
    ):
        yield from step


def load(shards: ShardSet, workers: int, max_pixels: int) -> float:
    """Images per second of whole epochs, without what starting the processes takes."""
    rates = []
    for _ in range(ROUNDS):
        parts = epoch(shards, workers, max_pixels, epochs=1 + workers)
        for _ in range(3 * workers):
            next(parts)
        began = time.perf_counter()
        count = sum(len(part["index"]) for part in parts)
        rates.append(count / (time.perf_counter() - began))
    return max(rates)


def mnist(source: Path, folder: Path) -> None:
    began = time.perf_counter()
    samples = ShardSet.open(
        prepare(PrepareConfig(dataset="mnist", source=source, out=folder / "set", workers=2))
    ).summary()
    print(f"{sum(samples['samples'].values())} images in {time.perf_counter() - began:.1f} s")


def plan(folder: Path, count: int = 1_280_000, per_shard: int = 2560) -> None:
    """A set of so many samples, of which one shard is real and the others are its copies."""
    records = [
        Record(
            f"sample-{i:08d}",
            encode_png(np.zeros((1, 1), np.uint8)),
            "png",
            256 + i % 24,
            256,
            "L",
            i % 1000,
        )
        for i in range(per_shard)
    ]
    first = write_shard_files(folder, shard_file("train", 0), records, [])
    entries = [
        first.model_copy(update={"file": shard_file("train", n)}) for n in range(count // per_shard)
    ]
    for entry in entries[1:]:
        shutil.copy(folder / first.file, folder / entry.file)
        shutil.copy(folder / first.index_file, folder / entry.index_file)
    Manifest(
        format_version=FORMAT_VERSION,
        dataset="copies",
        source_digest="0" * 64,
        rejects=0,
        class_names=[str(n) for n in range(1000)],
        splits={"train": SplitEntry(samples=count, bytes=0, shards=entries)},
    ).write(folder)

    before = megabytes()
    began = time.perf_counter()
    samples = ShardSet.open(folder).split("train")
    seconds, taken = time.perf_counter() - began, megabytes() - before
    print(f"index of {len(samples)} samples: {seconds:.2f} s, {taken:.0f} MB")
    began = time.perf_counter()
    buckets = make_buckets(samples.height, samples.width, None, 1 << 20)
    print(f"{len(buckets.sizes)} buckets: {time.perf_counter() - began:.2f} s")
    began = time.perf_counter()
    steps = plan_epoch(buckets, digest="0" * 64, seed=0, epoch=0, batch=256)
    seconds, taken = time.perf_counter() - began, megabytes() - before
    print(f"order of an epoch of {len(steps)} steps: {seconds:.2f} s; in all {taken:.0f} MB")
    began = time.perf_counter()
    step = next(
        image_loader(
            ShardSet.open(folder),
            DataConfig(shards=folder, size=(1, 1)),
            split="train",
            batch=256,
            micro_batch=256,
            seed=0,
            start_step=len(steps) // 2,
            total_steps=len(steps),
        )
    )
    print(
        "from opening the set to the first batch in the middle of an epoch: "
        f"{time.perf_counter() - began:.2f} s ({len(step[0]['keys'])} images)"
    )


def megabytes() -> float:
    """Memory of this process now, in MB."""
    return resident("VmRSS") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["photos", "mnist", "plan"])
    parser.add_argument("source", type=Path, nargs="?")
    parser.add_argument("--max-pixels", type=int, default=65536)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if arguments.what == "photos":
            photos(arguments.source, Path(name), arguments.max_pixels)
        elif arguments.what == "mnist":
            mnist(arguments.source, Path(name))
        else:
            plan(Path(name))


if __name__ == "__main__":
    main()
