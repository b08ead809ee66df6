"""Verify a shard set: rehash every file, decode every image, and list all damage.

The tar format itself reveals little damage: a flipped bit in an image goes unnoticed, and a tar
that is cut between two members reads as a shorter one.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from r2id.data.index import read_commit, read_index
from r2id.data.manifest import MANIFEST, REJECTS, Manifest, ShardEntry, SplitEntry, read_manifest
from r2id.data.records import inspect
from r2id.errors import InputError
from r2id.files import sha256_file
from r2id.progress import Progress

_CHECKED = ["key", "offset", "size", "height", "width", "sha256"]  # columns of the index


@dataclass(frozen=True)
class Damage:
    """One finding: ``file`` is relative to the set, ``key`` names the sample if one is damaged."""

    file: str
    what: str
    key: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {f'sample {self.key}: ' if self.key else ''}{self.what}"


def verify(folder: Path) -> list[Damage]:
    """List all damage; an empty list means that every byte and image is as it was written.

    Raises InputError when the folder has no manifest. A damaged manifest is listed alone, because
    nothing else can be checked without it.
    """
    try:
        manifest = read_manifest(folder)
    except InputError as error:
        if not (folder / MANIFEST).is_file():
            raise
        return [Damage(MANIFEST, str(error).removeprefix(f"{folder / MANIFEST}: "))]
    damages = list(_check_manifest(folder, manifest))
    with Progress(
        "verify", sum(split.samples for split in manifest.splits.values()), unit="images"
    ) as progress:
        for name, split in manifest.splits.items():
            damages += _check_split(folder, name, split, progress)
    return damages


def _check_manifest(folder: Path, manifest: Manifest) -> Iterator[Damage]:
    if manifest.checksum != manifest.expected_checksum():
        yield Damage(MANIFEST, "edited or damaged: its checksum does not fit its content")
    listed = {
        file
        for split in manifest.splits.values()
        for entry in split.shards
        for file in (entry.file, entry.index_file)
    }
    present = {
        path.relative_to(folder).as_posix() for path in folder.glob("*/shard-*") if path.is_file()
    }
    for extra in sorted(present - listed):
        yield Damage(extra, "not in the manifest")
    table = folder / REJECTS
    if table.is_file() != bool(manifest.rejects_sha256):
        yield Damage(REJECTS, "not in the manifest" if table.is_file() else "missing")
    elif table.is_file() and sha256_file(table) != manifest.rejects_sha256:
        yield Damage(REJECTS, "changed: its hash is not the manifest's")


def _check_split(
    folder: Path, name: str, split: SplitEntry, progress: Progress
) -> Iterator[Damage]:
    if split.samples != sum(entry.samples for entry in split.shards):
        yield Damage(
            MANIFEST,
            f"split {name!r} has {split.samples} samples, and another number in its shards",
        )
    keys: list[str] = []
    for entry in split.shards:
        damages = list(_check_index(folder, entry))
        yield from damages
        if not damages:
            index = read_index(folder, entry, _CHECKED)
            keys += index["key"].to_pylist()
            yield from _check_tar(folder, entry, index)
        progress.advance(entry.samples)
    for key in [key for key, count in Counter(keys).items() if count > 1]:
        yield Damage(name, "key twice in one split", key)


def _check_index(folder: Path, entry: ShardEntry) -> Iterator[Damage]:
    try:
        stated, _ = read_commit(folder, entry.file)
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        yield Damage(entry.index_file, "missing" if missing else str(error))
        return
    if stated.index_sha256 != entry.index_sha256:
        yield Damage(entry.index_file, "changed: its hash is not the manifest's")
    elif stated != entry:
        yield Damage(MANIFEST, f"its entry of {entry.file} differs from the index of that shard")


def _check_tar(folder: Path, entry: ShardEntry, index: pa.Table) -> Iterator[Damage]:
    path = folder / entry.file
    if not path.is_file():
        yield Damage(entry.file, "missing")
        return
    if path.stat().st_size != entry.bytes:
        yield Damage(entry.file, f"{path.stat().st_size} bytes instead of {entry.bytes}")
    elif sha256_file(path) != entry.sha256:
        yield Damage(entry.file, "changed: its hash is not the manifest's")
    content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
    for row in index.to_pylist():
        what = _check_sample(content[row["offset"] : row["offset"] + row["size"]].tobytes(), row)
        if what:
            yield Damage(entry.file, what, row["key"])


def _check_sample(data: bytes, row: dict) -> str | None:
    if len(data) != row["size"]:
        return "cut off"
    if hashlib.sha256(data).digest() != row["sha256"]:
        return "its image has changed"
    try:
        facts = inspect(data)
    except ValueError as error:
        return str(error)
    if (facts.height, facts.width) != (row["height"], row["width"]):
        return (
            f"is {facts.height}x{facts.width}, not {row['height']}x{row['width']} as the index says"
        )
    return None
