"""The plan of a shard set: which image goes where, decided before anything is written.

It is kept in the set: ``plan.json`` and, one row group per shard, ``plan.parquet``.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.base import Item, Reader
from data_prep.readers import open_reader
from r2id.config import PrepareConfig
from r2id.data.files import atomic_file, sweep, write_atomic
from r2id.data.shards import FORMAT_VERSION, PLAN, ShardSet, shard_file
from r2id.errors import InputError
from r2id.progress import say

DOWNLOADS = "source"
"""Subfolder of the set for files that are downloaded."""

_ITEMS = "plan.parquet"
_SHARDS_WANTED, _SMALL_SHARD = 8, 16e6  # per split, so that several workers have something to do; bytes
_BLOCK, _TAR_END = 512, 10240  # bytes
_SCHEMA = pa.schema([("key", pa.string()), ("split", pa.string()), ("label", pa.int32()), ("place", pa.binary()),
                     ("size", pa.int64())])


@dataclass(frozen=True)
class Plan:
    """What will be in each shard. The lists of images stay on disk, so that this is light to send to workers."""

    config: PrepareConfig
    source_digest: str
    class_names: list[str]
    files: list[str]
    """Of the shards, relative to the set."""
    samples: list[int]
    """Planned images of each."""

    @property
    def out(self) -> Path:
        return self.config.out

    @property
    def downloads(self) -> Path:
        return self.out / DOWNLOADS

    def items(self, number: int) -> list[Item]:
        """The images of one shard, in order."""
        table = pq.ParquetFile(self.out / _ITEMS).read_row_group(number)
        return [Item(row["key"], row["split"], row["label"], os.fsdecode(row["place"]), row["size"])
                for row in table.to_pylist()]


def make_plan(config: PrepareConfig) -> Plan:
    """List the source and decide what goes where; or the plan in ``out``, when it is that of the same source.

    Raises InputError when the source is missing, empty or damaged, or ``out`` holds something else.
    """
    out = config.out
    kept = _load(config)
    if kept and is_complete(out) and (config.source is None or not config.source.exists()):
        return kept  # a finished set needs its source no more
    if not kept:
        _check_vacant(out)
    reader = open_reader(config.dataset, config.source, out / DOWNLOADS)
    if kept and kept.source_digest != reader.digest:
        raise InputError(f"out {out}: was made from another source than {config.source}: choose another folder, "
                         "or remove this one")
    sweep(out)
    return kept or _write(config, reader, reader.items())


def is_complete(out: Path) -> bool:
    """Whether a finished set lies there, with all its shards at their full length."""
    try:
        ShardSet.open(out)
    except InputError:
        return False
    return True


def _check_vacant(out: Path) -> None:
    """There may be downloads and what a killed start left, nothing else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out}: exists and is no folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = sorted(name for name in names if name != DOWNLOADS and not name.startswith("plan."))
    if foreign:
        raise InputError(f"out {out}: exists and holds something else ({foreign[0]}): choose another folder")


def _load(config: PrepareConfig) -> Plan | None:
    """The plan in ``out``, if any; InputError when it was made with other settings."""
    path = config.out / PLAN
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_bytes())
        plan = Plan(config, stored["source_digest"], stored["class_names"], stored["files"], stored["samples"])
        settings = stored["settings"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove {config.out} and prepare again") from None
    for name, value in _settings(config).items():
        if settings.get(name) != value:
            raise InputError(f"out {config.out}: was made with {name} = {settings.get(name)!r}, not {value!r}: "
                             "choose another folder, or remove this one")
    return plan


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What a plan depends on beside the source."""
    return {"format_version": FORMAT_VERSION, "dataset": config.dataset, "shard_mb": config.shard_mb}


def _write(config: PrepareConfig, reader: Reader, items: Sequence[Item]) -> Plan:
    shards = plan_shards(items, config.shard_mb)
    say(f"{config.dataset}: {_describe(items)}, {len(reader.class_names)} classes, {len(shards)} shards")
    with atomic_file(config.out / _ITEMS) as file, pq.ParquetWriter(file, _SCHEMA) as writer:
        for _, members in shards:
            rows = [{**vars(item), "place": os.fsencode(item.place)} for item in members]
            writer.write_table(pa.Table.from_pylist(rows, _SCHEMA), row_group_size=max(len(rows), 1))
    plan = Plan(config, reader.digest, reader.class_names, [file for file, _ in shards],
                [len(members) for _, members in shards])
    content = {"settings": _settings(config), "source_digest": plan.source_digest, "class_names": plan.class_names,
               "files": plan.files, "samples": plan.samples}
    write_atomic(config.out / PLAN, json.dumps(content, indent=1).encode())
    return plan


def plan_shards(items: Sequence[Item], shard_mb: float) -> list[tuple[str, list[Item]]]:
    """(file, items) of every shard: splits apart, each in a fixed random order, so that a shard is a fair sample.

    A shard has at most ``shard_mb`` megabytes (10⁶ bytes), unless one image alone has more.
    """
    shards = []
    for split in dict.fromkeys(item.split for item in items):
        members = [item for item in items if item.split == split]
        order = np.argsort(np.random.Generator(np.random.PCG64(0)).random(len(members)), kind="stable")
        footprints = np.array([_footprint(item) for item in members])
        limit = min(shard_mb * 1e6 - _TAR_END, max(float(footprints.sum()) / _SHARDS_WANTED, _SMALL_SHARD))
        groups: list[list[Item]] = []
        filled = limit
        for position in order:
            if filled + footprints[position] > limit:
                groups.append([])
                filled = 0.0
            groups[-1].append(members[position])
            filled += footprints[position]
        shards += [(shard_file(split, number), group) for number, group in enumerate(groups)]
    return shards


def _footprint(item: Item) -> int:
    """Upper bound of a sample's bytes in a tar: three headers, the image, the class, the facts."""
    facts = 256 + 6 * len(item.place)  # six is what JSON makes of one odd character
    return 4 * _BLOCK + sum(-(-size // _BLOCK) * _BLOCK for size in (item.size, facts))


def _describe(items: Sequence[Item]) -> str:
    counts = Counter(item.split for item in items)
    return f"{len(items)} images ({', '.join(f'{split} {count}' for split, count in counts.items())})"
