"""The shard plan: which image goes into which shard, decided before any shard is written.

A set keeps its plan as ``plan.json`` and ``plan.parquet``, which has one row group per shard. (The
order in which training visits samples is another matter: see r2id.data.epoch_plan.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.items import Item, Listing
from data_prep.readers import DOWNLOADS, check_options, open_reader
from r2id.config import PrepareConfig
from r2id.data.embeddings import DTYPE
from r2id.data.manifest import FORMAT_VERSION, MANIFEST, PLAN, Reject, read_manifest, shard_file
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.files import atomic_file, sha256_file, sweep, write_atomic
from r2id.progress import say

_ITEMS = "plan.parquet"
# A small split is divided into 8 shards, so that several workers have something to do, unless the
# shards would be smaller than 16 MB.
_SHARDS_WANTED, _SMALL_SHARD = 8, 16e6
_BLOCK, _TAR_END, _NPY_HEADER = 512, 10240, 128  # bytes
_LATER = {"partial": False}  # values of settings that plans of earlier versions lack
_REJECTS_ALLOWED = 10  # images, even if max_rejects allows fewer
# Fields of a plan that plan.json holds under their own names.
_KEPT = ("source_digest", "items_sha256", "class_names", "attribute_names", "files", "samples")


@dataclass(frozen=True)
class ShardPlan:
    """The images that go into each shard.

    The tables of images stay on disk, so that a plan is small enough to send to worker processes.
    """

    config: PrepareConfig
    source_digest: str
    items_sha256: str
    class_names: list[str]
    attribute_names: list[str]
    files: list[str]
    """The shards, relative to the set."""
    samples: list[int]
    """Number of images planned for each shard."""
    embedding_shape: list[int] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    """Files that the listing already rejected."""
    newest: int = 0
    """Files of the source that are later than this have changed; see data_prep.items.Listing."""

    @property
    def out(self) -> Path:
        return self.config.out

    def items(self, number: int) -> list[Item]:
        """Read the images of one shard, in order."""
        path = self.out / _ITEMS
        footer = _footer(path, self.items_sha256)
        with path.open("rb") as file:  # pyarrow itself takes no path but of UTF-8
            table = pq.ParquetFile(file, metadata=footer).read_row_group(number)
        return [Item(**row) for row in table.to_pylist()]

    def check_budget(self, rejected: int, example: str) -> None:
        """Raise InputError or WorkError when too many images are rejected; see _check_budget."""
        _check_budget(self.config, sum(self.samples) + len(self.rejects), rejected, example)


@lru_cache(maxsize=1)
def _footer(path: Path, _sha256: str) -> pq.FileMetaData:
    """Parse the footer of plan.parquet, once per process: it grows with the number of shards."""
    with path.open("rb") as file:
        return pq.read_metadata(file)


def make_shard_plan(config: PrepareConfig) -> ShardPlan:
    """List the source and plan its shards, or return the plan in ``out`` for the same source.

    Raises InputError when the source is missing, empty or damaged, or ``out`` holds something else;
    WorkError when files have changed since an unfinished preparation began.
    """
    out = config.out
    check_options(config)
    kept = load_shard_plan(config)
    if kept and is_complete(out) and (config.source is None or not config.source.exists()):
        return kept  # a finished set no longer needs its source
    if not kept:
        _check_vacant(out, config.source)
    listing = open_reader(config).listing()
    say(f"{config.dataset}: {listing.describe()}")
    if kept and kept.source_digest != listing.digest:
        raise InputError(
            f"out {out}: was made from another source than {config.source}: choose another folder, "
            "or remove this one"
        )
    newest = _newest_allowed(kept, listing) if kept else listing.newest
    sweep(out)
    return replace(kept, newest=newest) if kept else _write(config, listing)


def load_shard_plan(config: PrepareConfig) -> ShardPlan | None:
    """Read the plan in ``out``, if any; InputError when it is damaged or of other settings."""
    path = config.out / PLAN
    if not path.is_file():
        return None
    stored = read_shard_plan(config.out)
    for name, value in _settings(config).items():
        before = stored["settings"].get(name, _LATER.get(name))
        if before != value:
            raise InputError(
                f"out {config.out}: was made with {name} = {before!r}, "
                f"not {value!r}: choose another folder, or remove this one"
            )
    try:
        return ShardPlan(
            config,
            **{name: stored[name] for name in _KEPT},
            embedding_shape=stored.get("embedding_shape", []),
            rejects=[Reject(*row) for row in stored["rejects"]],
            newest=stored.get("newest", 0),
        )
    except (KeyError, TypeError):
        raise InputError(f"{path}: damaged: remove {config.out} and prepare again") from None


def read_shard_plan(out: Path) -> dict[str, Any]:
    """Read plan.json; InputError when it or the table of images is missing or damaged."""
    try:
        stored = json.loads((out / PLAN).read_bytes())
        intact = sha256_file(out / _ITEMS) == stored["items_sha256"] and isinstance(
            stored["settings"], dict
        )
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(
            f"{out / PLAN}: missing or damaged, it or {_ITEMS}, or by another version of r2id: "
            f"remove {out} and prepare again"
        )
    return stored


def is_complete(out: Path) -> bool:
    """Return whether a folder holds a finished set with all shards at their full length."""
    try:
        ShardSet.open(out)
    except InputError:
        return False
    return True


def _check_budget(config: PrepareConfig, total: int, rejected: int, example: str) -> None:
    """Raise InputError when all images are rejected, WorkError when more are than allowed."""
    if rejected == total:
        raise InputError(
            f"source {config.source}: none of its {total} images can be used: {example}"
        )
    if rejected > max(_REJECTS_ALLOWED, config.max_rejects * total):
        raise WorkError(
            f"source {config.source}: {rejected} of {total} images cannot be used, more than may "
            f"be left out ({_REJECTS_ALLOWED}, or a share of max_rejects = {config.max_rejects:g}),"
            f" such as {example}"
        )


def _newest_allowed(kept: ShardPlan, listing: Listing) -> int:
    """Return the latest time that files of the source may have for shards to be written of them.

    Raises WorkError when the source of an unfinished set has a later file: its shards would mix
    images and embeddings of before with those of now, and their digest may well be the same.
    """
    # Plans of earlier versions have no time, and nor do those whose digest covers the content.
    if not kept.newest or listing.newest <= kept.newest:
        return listing.newest
    source, out = kept.config.source, kept.out
    if not (out / MANIFEST).is_file():
        raise WorkError(
            f"{source}: changed since the preparation began, or copied since without its times: "
            f"delete {out}, or give another --out"
        )
    say(
        f"{source}: has files newer than the set {out}, which is kept: to make it anew, delete it "
        "or give another --out"
    )
    # The manifest tells whether a shard that is written again is the same.
    return listing.newest if recorded_hashes(out) else kept.newest


def recorded_hashes(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each shard according to the manifest; none if that is damaged."""
    try:
        manifest = read_manifest(out)
    except InputError:
        return {}
    if manifest.checksum != manifest.expected_checksum():
        return {}
    shards = (entry for split in manifest.splits.values() for entry in split.shards)
    return {entry.file: entry.sha256 for entry in shards}


def _check_vacant(out: Path, source: Path | None) -> None:
    """Raise InputError if ``out`` holds more than downloads and the rest of a killed start."""
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise InputError(f"out {out}: holds the source {source}: choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"out {out}: exists and is no folder")
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    foreign = sorted(name for name in names if name != DOWNLOADS and not name.startswith("plan."))
    if foreign:
        raise InputError(
            f"out {out}: exists and holds something else ({foreign[0]}): choose another folder"
        )


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """Return the settings that a plan depends on, apart from its source."""
    names = ("dataset", "shard_mb", "label", "images", "partial", "max_megapixels")
    return {"format_version": FORMAT_VERSION, **{name: getattr(config, name) for name in names}}


def _write(config: PrepareConfig, listing: Listing) -> ShardPlan:
    """Make the plan of a listing and write it to ``config.out``."""
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
    items = listing.items.combine_chunks()  # of many chunks, each take would look through all
    with atomic_file(config.out / _ITEMS) as file, pq.ParquetWriter(file, items.schema) as writer:
        for _, rows in shards:
            writer.write_table(items.take(rows), row_group_size=max(len(rows), 1))
    plan = ShardPlan(
        config,
        listing.digest,
        sha256_file(config.out / _ITEMS),
        listing.class_names,
        listing.attribute_names,
        [file for file, _ in shards],
        [len(rows) for _, rows in shards],
        listing.embedding_shape,
        rejects,
        listing.newest,
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
        **({} if listing.hashed else {"newest": listing.newest}),
        "rejects": [[reject.split, reject.source, reject.reason] for reject in rejects],
    }
    write_atomic(config.out / PLAN, json.dumps(content, indent=1).encode())
    return plan


def plan_shards(
    items: pa.Table, shard_mb: float, attributes: int = 0, embedding_shape: Sequence[int] = ()
) -> list[tuple[str, np.ndarray]]:
    """Distribute items over shards; return (file, rows of ``items``) of every shard.

    Each split is put into a fixed random order, so that every shard is a fair sample of it. Items
    of a block stay adjacent, in one shard if its size allows. A shard has at most ``shard_mb``
    megabytes (10⁶ bytes), unless a single image has more.
    """
    shards = []
    size = items["size"].to_numpy()
    # An upper bound of a sample's bytes in a tar: three headers, the image, the class (one block)
    # and the JSON. JSON takes up to six bytes for an escaped character, and as many for an
    # attribute. Sets with attributes have other annotations as well.
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
        starts, filled = [], limit  # as if full, so that the first item starts a shard
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
    """Return a fixed random order of items; those of one block (−1: none) are adjacent."""
    generator = np.random.Generator(np.random.PCG64(0))
    own = generator.random(len(block))
    if (block < 0).all():
        return np.argsort(own, kind="stable")
    names, inverse = np.unique(block, return_inverse=True)
    return np.lexsort((own, generator.random(len(names))[inverse]))


def _padded(sizes: np.ndarray) -> np.ndarray:
    return -(-sizes // _BLOCK) * _BLOCK
