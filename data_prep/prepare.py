"""Source → shard set: a plan first, then shards as pure functions of the plan, then the manifest.

A shard has the same bytes whoever writes it and when, so a preparation that was killed is simply run again: what is
committed and intact stays, the rest is written.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.readers import DOWNLOADS, keep_reader
from data_prep.shard_plan import Plan, is_complete, make_plan
from data_prep.tars import free
from r2id.config import PrepareConfig
from r2id.data.index import find_intact, read_commit
from r2id.data.manifest import FORMAT_VERSION, REJECTS, Manifest, Reject, ShardEntry, SplitEntry
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.errors import WorkError
from r2id.files import write_atomic
from r2id.progress import Progress, say

__all__ = [
    "Plan",
    "end_with_parent",
    "finish",
    "make_plan",
    "pending",
    "prepare",
    "write_shard",
    "write_shards",
]

_AHEAD = 8  # records

WriteAll = Callable[[Plan, Sequence[int]], Iterator[dict[str, Any]]]
"""(plan, numbers) → the results of write_shard for these numbers, in any order, as they come."""


def prepare(config: PrepareConfig, write_all: WriteAll | None = None) -> Path:
    """Shard a dataset; returns its folder, at once when it is already complete.

    ``write_all`` is for an orchestrator that runs write_shard by itself; none is a pool of ``config.workers`` processes.
    Raises InputError when the source is missing, empty or damaged, or ``out`` holds something else; WorkError when too
    many images cannot be read or the disk refuses.
    """
    plan = make_plan(config)
    waiting = pending(plan)
    if waiting:
        rejected = len(plan.rejects)
        with Progress(f"prepare {config.dataset}", sum(plan.samples), unit="images") as progress:
            for result in (write_all or write_shards)(plan, waiting):
                rejected += result["rejects"]
                plan.check_budget(rejected, result["example"])
                progress.advance(result["samples"] + result["rejects"])
        finish(plan)
    else:
        _free(plan)  # to see that the source was the same it had to be decompressed
    return config.out


def pending(plan: Plan) -> list[int]:
    """Numbers of the shards to call write_shard for: none when the set is complete."""
    return [] if is_complete(plan.out) else list(range(len(plan.files)))


def write_shard(plan: Plan, number: int) -> dict[str, Any]:
    """Write one shard, unless it is there and intact.

    Returns {"file", "samples", "bytes", "rejects": int, "example": one reject in words, or an empty text}.
    """
    file = plan.files[number]
    if find_intact(plan.out, file) is None:
        reader = keep_reader(plan.config, plan.newest)
        refused: list[Reject] = []
        records = reader.records(plan.items(number), refused, plan.newest, plan.embedding_shape)
        write_shard_files(plan.out, file, _ahead(records), refused)
    entry, rejects = read_commit(plan.out, file)
    return {
        "file": file,
        "samples": entry.samples,
        "bytes": entry.bytes,
        "rejects": len(rejects),
        "example": _words(rejects),
    }


def finish(plan: Plan) -> Manifest:
    """Commit the set: the rejects table, then the manifest. Every shard must have been written."""
    entries: dict[str, list[ShardEntry]] = {}
    rejects = list(plan.rejects)
    for file in plan.files:
        try:
            entry, refused = read_commit(plan.out, file)
        except (OSError, ValueError) as error:
            raise WorkError(f"{plan.out / file}: not written: {error}") from None
        entries.setdefault(file.split("/")[0], []).append(entry)
        rejects += refused
    plan.check_budget(len(rejects), _words(rejects))
    table = _rejects_table(rejects) if rejects else b""
    if rejects:
        write_atomic(plan.out / REJECTS, table)
        say(f"{plan.out / REJECTS}: {len(rejects)} images rejected, with the reasons")
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
    _free(plan)
    return manifest


def write_shards(plan: Plan, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Results of write_shard as they come, from as many processes as the config says."""
    workers = min(plan.config.workers, len(numbers))
    if workers == 1:
        yield from (write_shard(plan, number) for number in numbers)
        return
    # Processes are started afresh: a copy of one that runs threads may hold a lock for ever.
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), end_with_parent
    ) as pool:
        futures = [pool.submit(write_shard, plan, number) for number in numbers]
        try:
            yield from (future.result() for future in as_completed(futures))
        except BrokenProcessPool:
            raise WorkError(
                "a worker process was killed, perhaps for want of memory: the same command goes on"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """For the start of a worker process: it ends as soon as the process that started it does, even by SIGKILL.

    Otherwise it would wait for work for ever: the other workers hold its pipe open.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()


def _ahead(records: Iterator[Record]) -> Iterator[Record]:
    """The same records, made by a thread while the ones before them are hashed and written."""
    made: queue.Queue[Record | BaseException | None] = queue.Queue(_AHEAD)
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
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                made.get(timeout=0.05)


def _free(plan: Plan) -> None:
    """Of what can be had again from the source."""
    if plan.config.source is not None:
        free(plan.out / DOWNLOADS)


def _words(rejects: Sequence[Reject]) -> str:
    return f"{rejects[0].source}: {rejects[0].reason}" if rejects else ""


def _rejects_table(rejects: Sequence[Reject]) -> bytes:
    buffer = io.StringIO(newline="")
    table = csv.writer(buffer)
    table.writerow(["split", "source", "reason"])
    table.writerows((reject.split, reject.source, reject.reason) for reject in rejects)
    return buffer.getvalue().encode(errors="backslashreplace")
