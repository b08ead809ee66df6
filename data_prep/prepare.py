"""Prepare a shard set: first a shard plan, then the shards, then the manifest.

A shard is a pure function of the shard plan: its bytes do not depend on when and by which process
it is written. So a preparation that was killed is simply run again: it keeps the shards that are
committed and intact, and writes the others.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.readers import DOWNLOADS, cached_reader
from data_prep.shard_plan import ShardPlan, is_complete, make_shard_plan, recorded_hashes
from data_prep.tars import remove_decompressed
from r2id.config import PrepareConfig
from r2id.data.index import find_intact, read_commit
from r2id.data.manifest import FORMAT_VERSION, REJECTS, Manifest, Reject, ShardEntry, SplitEntry
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.errors import WorkError
from r2id.files import exclusive, write_atomic
from r2id.parent_process import exit_with_parent
from r2id.progress import Progress, counted, say

__all__ = [
    "ShardPlan",
    "check_rebuilt",
    "finish",
    "make_shard_plan",
    "pending_shards",
    "prepare",
    "write_shard",
    "write_shards",
]

_PREFETCHED = 8  # records that are made ahead of writing

WriteAll = Callable[[ShardPlan, Sequence[int]], Iterator[dict[str, Any]]]
"""Writes the shards of a plan with these numbers; yields results of write_shard in any order."""


def prepare(config: PrepareConfig, write_all: WriteAll | None = None) -> Path:
    """Write the shard set of a dataset and return its folder; a complete set is left as it is.

    By default write_shard runs in a pool of ``config.workers`` processes. ``write_all`` lets an
    orchestrator distribute the calls itself.

    Raises InputError when the source is missing, empty or damaged, or ``out`` holds something else;
    WorkError when too many images cannot be read, the disk cannot be written, or another process
    prepares the same set.
    """
    with exclusive(config.out):
        _prepare(config, write_all or write_shards)
    return config.out


def _prepare(config: PrepareConfig, write_all: WriteAll) -> None:
    plan = make_shard_plan(config)
    waiting = pending_shards(plan)
    if waiting:
        rejected, recorded = len(plan.rejects), recorded_hashes(plan.out)
        with Progress(f"prepare {config.dataset}", sum(plan.samples), unit="images") as progress:
            for result in write_all(plan, waiting):
                check_rebuilt(plan, result["file"], recorded)
                rejected += result["rejects"]
                plan.check_budget(rejected, result["example"])
                progress.advance(result["samples"] + result["rejects"])
        finish(plan)
    else:
        _remove_decompressed(plan)  # which listing the source again may have made


def pending_shards(plan: ShardPlan) -> list[int]:
    """Return the numbers of the shards that write_shard is to write; none for a complete set."""
    return [] if is_complete(plan.out) else list(range(len(plan.files)))


def write_shard(plan: ShardPlan, number: int) -> dict[str, Any]:
    """Write one shard, unless it is there and intact.

    Returns its "file", "samples", "bytes", the number of "rejects" and an "example" of them or "".
    """
    file = plan.files[number]
    if find_intact(plan.out, file) is None:
        reader = cached_reader(plan.config, plan.newest)
        rejected: list[Reject] = []
        records = reader.records(plan.items(number), rejected, plan.newest, plan.embedding_shape)
        write_shard_files(plan.out, file, _prefetch(records), rejected)
    entry, rejects = read_commit(plan.out, file)
    return {
        "file": file,
        "samples": entry.samples,
        "bytes": entry.bytes,
        "rejects": len(rejects),
        "example": _first_reason(rejects),
    }


def check_rebuilt(plan: ShardPlan, file: str, recorded: Mapping[str, str]) -> None:
    """Raise WorkError, and remove a shard, when it is not the one whose SHA-256 is recorded."""
    rebuilt = read_commit(plan.out, file)[0].sha256
    if rebuilt != recorded.get(file, rebuilt):
        for part in (plan.out / file, (plan.out / file).with_suffix(".parquet")):
            part.unlink(missing_ok=True)
        raise WorkError(
            f"{plan.out / file}: cannot be rebuilt: source {plan.config.source} no longer has the "
            "images or embeddings it was made of, though their names and lengths are the same"
        )


def finish(plan: ShardPlan) -> Manifest:
    """Commit the set: write the rejects table, then the manifest.

    Raises WorkError when a shard is missing, or more images were rejected than are allowed.
    """
    entries: dict[str, list[ShardEntry]] = {}
    rejects = list(plan.rejects)
    for file in plan.files:
        try:
            entry, rejected = read_commit(plan.out, file)
        except (OSError, ValueError) as error:
            raise WorkError(f"{plan.out / file}: not written: {error}") from None
        entries.setdefault(file.split("/")[0], []).append(entry)
        rejects += rejected
    plan.check_budget(len(rejects), _first_reason(rejects))
    table = _rejects_table(rejects) if rejects else b""
    if rejects:
        write_atomic(plan.out / REJECTS, table)
        say(f"{plan.out / REJECTS}: {counted(len(rejects), 'image')} rejected, with the reasons")
    else:
        (plan.out / REJECTS).unlink(missing_ok=True)
    splits = {
        split: SplitEntry(
            samples=sum(entry.samples for entry in shards),
            bytes=sum(entry.bytes for entry in shards),
            shards=shards,
        )
        for split, shards in entries.items()
    }
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        dataset=plan.config.dataset,
        source_digest=plan.source_digest,
        class_names=plan.class_names,
        attribute_names=plan.attribute_names,
        embedding_shape=plan.embedding_shape,
        rejects=len(rejects),
        rejects_sha256=hashlib.sha256(table).hexdigest() if rejects else "",
        splits=splits,
    ).write(plan.out)
    _remove_decompressed(plan)
    return manifest


def write_shards(plan: ShardPlan, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Write shards in ``config.workers`` processes; yield each result when it is ready."""
    workers = min(plan.config.workers, len(numbers))
    if workers == 1:
        yield from (write_shard(plan, number) for number in numbers)
        return
    # Processes are spawned, not forked: a fork of a process with threads may inherit a locked lock.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), exit_with_parent
    ) as pool:
        futures = [pool.submit(write_shard, plan, number) for number in numbers]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool:
            raise WorkError(
                "a worker process was killed, perhaps for lack of memory: run the same command "
                "again to continue"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _prefetch(records: Iterator[Record]) -> Iterator[Record]:
    """Yield the same records; a thread makes them while earlier ones are hashed and written."""
    made: queue.Queue[Record | BaseException | None] = queue.Queue(_PREFETCHED)
    stopped = threading.Event()

    def make() -> None:
        end: BaseException | None = None
        try:
            for record in records:
                made.put(record)
                if stopped.is_set():
                    return
        except BaseException as error:
            end = error
        made.put(end)

    thread = threading.Thread(target=make, daemon=True, name="records")
    thread.start()
    try:
        while isinstance(record := made.get(), Record):
            yield record
        if record is not None:
            raise record
    finally:
        stopped.set()
        while thread.is_alive():  # it may be waiting for room in the queue
            with contextlib.suppress(queue.Empty):
                made.get(timeout=0.05)


def _remove_decompressed(plan: ShardPlan) -> None:
    """Remove decompressed copies, which can be made again; downloaded files stay."""
    if plan.config.source is not None:
        remove_decompressed(plan.out / DOWNLOADS)


def _first_reason(rejects: Sequence[Reject]) -> str:
    return f"{rejects[0].source}: {rejects[0].reason}" if rejects else ""


def _rejects_table(rejects: Sequence[Reject]) -> bytes:
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer)
    table.writerow(["split", "source", "reason"])
    table.writerows((reject.split, reject.source, reject.reason) for reject in rejects)
    return buffer.getvalue().encode(errors="backslashreplace")
