"""The plan of a shard set: which image goes where, decided before anything is written.

It is kept in the set: ``plan.json`` and, one row group per shard, ``plan.parquet``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.base import Item, Listing
from data_prep.readers import DOWNLOADS, check_options, open_reader
from r2id.config import PrepareConfig
from r2id.data.embeddings import DTYPE
from r2id.data.manifest import FORMAT_VERSION, PLAN, Reject, shard_file
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.files import atomic_file, sha256_file, sweep, write_atomic
from r2id.progress import say

_ITEMS = "plan.parquet"
_SHARDS_WANTED, _SMALL_SHARD = (
    8,
    16e6,
)  # per split, so that several workers have something to do; bytes
_BLOCK, _TAR_END, _NPY_HEADER = 512, 10240, 128  # bytes
_REJECTS_ALLOWED = 10  # whatever their share
_KEPT = (
    "source_digest",
    "items_sha256",
    "class_names",
    "attribute_names",
    "files",
    "samples",
)  # of a plan, as they are


@dataclass(frozen=True)
class Plan:
    """What will be in each shard. The lists of images stay on disk, so that this is light to send to workers."""

    config: PrepareConfig
    source_digest: str
    items_sha256: str
    class_names: list[str]
    attribute_names: list[str]
    files: list[str]
    """Of the shards, relative to the set."""
    samples: list[int]
    """Planned images of each."""
    embedding_shape: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    """What was known to be unusable before anything was read."""
    newest: int = 0
    """See Listing; of this machine's copy of the source, and therefore not kept."""

    @property
    def out(self) -> Path:
        return self.config.out

    def items(self, number: int) -> list[Item]:
        """The images of one shard, in order."""
        table = pq.ParquetFile(self.out / _ITEMS).read_row_group(number)
        return [Item(**row) for row in table.to_pylist()]

    def check_budget(self, rejected: int, example: str) -> None:
        """See _check_budget."""
        _check_budget(self.config, sum(self.samples) + len(self.rejects), rejected, example)


def make_plan(config: PrepareConfig) -> Plan:
    """List the source and decide what goes where; or the plan in ``out``, when it is that of the same source.

    Raises InputError when the source is missing, empty or damaged, or ``out`` holds something else.
    """
    out = config.out
    check_options(config)
    kept = load_plan(config)
    if kept and is_complete(out) and (config.source is None or not config.source.exists()):
        return kept  # a finished set needs its source no more
    if not kept:
        _check_vacant(out)
    listing = open_reader(config).listing()
    say(f"{config.dataset}: {listing.describe()}")
    if kept and kept.source_digest != listing.digest:
        raise InputError(
            f"out {out}: was made from another source than {config.source}: choose another folder, "
            "or remove this one"
        )
    sweep(out)
    plan = kept or _write(config, listing)
    return replace(plan, newest=listing.newest)


def load_plan(config: PrepareConfig) -> Plan | None:
    """The plan in ``out``, if any; InputError when it is damaged or was made with other settings."""
    path = config.out / PLAN
    if not path.is_file():
        return None
    stored = read_plan(config.out)
    for name, value in _settings(config).items():
        if stored["settings"].get(name) != value:
            raise InputError(
                f"out {config.out}: was made with {name} = {stored['settings'].get(name)!r}, not {value!r}: "
                "choose another folder, or remove this one"
            )
    try:
        return Plan(
            config,
            **{name: stored[name] for name in _KEPT},
            embedding_shape=stored.get("embedding_shape", []),
            rejects=[Reject(*row) for row in stored["rejects"]],
        )
    except (KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove {config.out} and prepare again") from None


def read_plan(out: Path) -> dict[str, Any]:
    """plan.json as it is. InputError when it or the list of images is missing or damaged."""
    try:
        stored = json.loads((out / PLAN).read_bytes())
        intact = sha256_file(out / _ITEMS) == stored["items_sha256"] and isinstance(
            stored["settings"], dict
        )
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(
            f"{out / PLAN}: missing or damaged, it or {_ITEMS}, or by another version of r2id: remove {out} "
            "and prepare again"
        )
    return stored


def is_complete(out: Path) -> bool:
    """Whether a finished set lies there, with all its shards at their full length."""
    try:
        ShardSet.open(out)
    except InputError:
        return False
    return True


def _check_budget(config: PrepareConfig, total: int, rejected: int, example: str) -> None:
    """InputError when nothing is left, WorkError when more cannot be used than may be left out."""
    if rejected == total:
        raise InputError(
            f"source {config.source}: none of its {total} images can be used: {example}"
        )
    if rejected > max(_REJECTS_ALLOWED, config.max_rejects * total):
        raise WorkError(
            f"source {config.source}: {rejected} of {total} images cannot be used, more than may be left out "
            f"(max_rejects {config.max_rejects:g}): {example}"
        )


def _check_vacant(out: Path) -> None:
    """There may be downloads and what a killed start left, nothing else."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out}: exists and is no folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = sorted(name for name in names if name != DOWNLOADS and not name.startswith("plan."))
    if foreign:
        raise InputError(
            f"out {out}: exists and holds something else ({foreign[0]}): choose another folder"
        )


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What a plan depends on beside the source."""
    names = ("dataset", "shard_mb", "label", "images", "max_megapixels")
    return {"format_version": FORMAT_VERSION, **{name: getattr(config, name) for name in names}}


def _write(config: PrepareConfig, listing: Listing) -> Plan:
    rejects = listing.rejects
    if rejects:
        _check_budget(
            config,
            len(listing.items) + len(rejects),
            len(rejects),
            f"{rejects[0].source}: {rejects[0].reason}",
        )
    shards = plan_shards(
        listing.items, config.shard_mb, len(listing.attribute_names), listing.embedding_shape
    )
    with (
        atomic_file(config.out / _ITEMS) as file,
        pq.ParquetWriter(file, listing.items.schema) as writer,
    ):
        for _, rows in shards:
            writer.write_table(listing.items.take(rows), row_group_size=max(len(rows), 1))
    plan = Plan(
        config,
        listing.digest,
        sha256_file(config.out / _ITEMS),
        listing.class_names,
        listing.attribute_names,
        [file for file, _ in shards],
        [len(rows) for _, rows in shards],
        listing.embedding_shape,
        rejects,
    )
    paths = {
        name: path and str(path.resolve())
        for name, path in (("source", config.source), ("labels", config.labels))
    }
    content = {
        "settings": _settings(config),
        **paths,
        "max_rejects": config.max_rejects,
        **{name: getattr(plan, name) for name in _KEPT},
        **({"embedding_shape": plan.embedding_shape} if plan.embedding_shape else {}),
        "rejects": [[reject.split, reject.source, reject.reason] for reject in rejects],
    }
    write_atomic(config.out / PLAN, json.dumps(content, indent=1).encode())
    return plan


def plan_shards(
    items: pa.Table, shard_mb: float, attributes: int = 0, embedding_shape: Sequence[int] = ()
) -> list[tuple[str, np.ndarray]]:
    """(file, rows of the items) of every shard: splits apart, each in a fixed random order, so that one is a fair sample.

    A shard has at most ``shard_mb`` megabytes (10⁶ bytes), unless one image alone has more. Items of a block stay together
    as far as that allows.
    """
    shards = []
    size = items["size"].to_numpy()
    # Upper bound of a sample's bytes in a tar: three headers, the image, the class, and the facts, of which six bytes are
    # what JSON makes of one odd character or of an attribute, with which other annotations come.
    facts = (
        256
        + 6 * pc.binary_length(items["place"]).to_numpy()
        + (256 + 6 * attributes if attributes else 0)
    )
    footprints = 4 * _BLOCK + _padded(size) + _padded(facts)
    if embedding_shape:
        content = _NPY_HEADER + DTYPE.itemsize * math.prod(embedding_shape)
        footprints += _BLOCK + -(-content // _BLOCK) * _BLOCK
    for split in items["split"].unique().to_pylist():
        members = np.flatnonzero(pc.equal(items["split"], split).to_numpy())
        order = members[_shuffle(items["block"].to_numpy()[members])]
        sizes = footprints[order]
        limit = min(
            shard_mb * 1e6 - _TAR_END, max(float(sizes.sum()) / _SHARDS_WANTED, _SMALL_SHARD)
        )
        starts, filled = [], limit
        for position, footprint in enumerate(sizes.tolist()):
            if filled + footprint > limit:
                starts.append(position)
                filled = 0.0
            filled += footprint
        shards += [
            (shard_file(split, number), rows)
            for number, rows in enumerate(np.split(order, starts[1:]))
        ]
    return shards


def _shuffle(block: np.ndarray) -> np.ndarray:
    """A fixed random order of items; those of a block (−1: none) come one after the other."""
    generator = np.random.Generator(np.random.PCG64(0))
    own = generator.random(len(block))
    if (block < 0).all():
        return np.argsort(own, kind="stable")
    names, inverse = np.unique(block, return_inverse=True)
    return np.lexsort((own, generator.random(len(names))[inverse]))


def _padded(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // _BLOCK) * _BLOCK
