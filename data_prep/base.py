"""What a dataset's reader provides: a list of what there is, made without decoding anything, and the records of it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from r2id.data.records import Record
from r2id.data.shards import Reject

TEST_SHARE = 0.1
"""Share of each class that becomes the test split where the source has none of its own."""

SCHEMA = pa.schema([("key", pa.string()), ("split", pa.string()), ("label", pa.int32()), ("place", pa.binary()),
                    ("size", pa.int64()), ("block", pa.int32())])
"""Columns of a list of items, one row for each; see Item."""

_CHUNK = 1 << 16  # rows


@dataclass(frozen=True, slots=True)
class Item:
    """One source image. ``place`` is what its reader finds it by; ``size`` is an upper bound of its stored bytes.

    Items of one ``block`` (−1: none) are read together, so they stay together in the shards.
    """

    key: str
    split: str
    label: int | None
    place: bytes
    size: int
    block: int = -1


class Items:
    """A list of items that grows; kept in columns, because there may be millions."""

    def __init__(self) -> None:
        self._rows: list[tuple[Any, ...]] = []
        self._chunks: list[pa.Table] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) + len(self._rows)

    def add(self, split: str, label: int | None, place: bytes, size: int, block: int = -1, key: str = "") -> None:
        """``key`` must be unique in its split; none takes the item's number."""
        self._rows.append((key or f"{split}-{len(self):08d}", split, label, place, size, block))
        if len(self._rows) == _CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        """All of them, as SCHEMA says."""
        self._flush()
        return pa.concat_tables(self._chunks)

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(SCHEMA)
        self._chunks.append(pa.Table.from_pydict(dict(zip(SCHEMA.names, columns, strict=True)), SCHEMA))
        self._rows = []


@dataclass(frozen=True)
class Listing:
    """All that a source holds, in an order that depends on the source alone."""

    items: pa.Table
    """As SCHEMA says."""
    digest: str
    """Identity of the source's content."""
    newest: int = 0
    """When the source was last changed, in nanoseconds: what is newer was changed since it was listed."""
    class_names: list[str] = field(default_factory=list)
    attribute_names: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    """What cannot become a sample, as far as that is known without reading it."""
    found: str = ""
    """What the source turned out to be, in words."""

    def describe(self) -> str:
        counts = Counter(self.items["split"].to_pylist())
        parts = [self.found, f"{len(self.items)} images ({', '.join(f'{split} {n}' for split, n in counts.items())})",
                 f"{len(self.class_names)} classes",
                 f"{len(self.attribute_names)} attributes" if self.attribute_names else "",
                 f"{len(self.rejects)} rejected so far ({self.rejects[0].source}: {self.rejects[0].reason})"
                 if self.rejects else ""]
        return ", ".join(part for part in parts if part)


class Reader(Protocol):
    """A dataset as it lies on disk. To open one is cheap and reads nothing that grows with the number of images."""

    def listing(self) -> Listing:
        """All images. Raises InputError when the source is missing, empty or of another kind."""
        ...

    def records(self, items: Sequence[Item], rejects: list[Reject], newest: int) -> Iterator[Record]:
        """These items' records, each completely decoded; what cannot be goes to ``rejects`` with the reason.

        WorkError when the source was changed after it was listed; ``newest`` is from the listing.
        """
        ...


def digest_of(parts: Iterable[tuple[bytes, int]]) -> str:
    """Of names and lengths: it takes no reading of the images, and does not change when a source is copied."""
    content = hashlib.sha256()
    for name, size in parts:
        content.update(name + b"\0%d\0" % size)
    return content.hexdigest()


def stratified_test(labels: Iterable[int | None], share: float) -> np.ndarray:
    """Which samples are for testing: bool [N], the same share of every class, the same ones every time."""
    known = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    chosen = np.zeros(len(known), dtype=bool)
    generator = np.random.Generator(np.random.PCG64(0))
    for label in np.unique(known):
        members = np.flatnonzero(known == label)
        order = np.argsort(generator.random(len(members)), kind="stable")
        chosen[members[order[:round(share * len(members))]]] = True
    return chosen


def number_classes(names: Iterable[str]) -> list[str]:
    """Distinct names in order: as numbers when all of them are."""
    distinct = set(names)
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)
