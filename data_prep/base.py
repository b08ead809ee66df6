"""What a dataset's reader provides: a list of what there is, made without decoding anything, and the records of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from r2id.data.manifest import Reject
from r2id.data.records import Record

TEST_SHARE = 0.1
"""Share of each class that becomes the test split where the source has none of its own."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("label", pa.int32()),
        ("place", pa.binary()),
        ("size", pa.int64()),
        ("block", pa.int32()),
    ]
)
"""Columns of a list of items, one row for each; see Item."""

_CHUNK = 1 << 14  # rows that are Python objects at a time


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


class Columns:
    """Rows that come one by one, kept in columns, because there may be millions."""

    def __init__(self, schema: pa.Schema) -> None:
        self._schema = schema
        self._rows: list[tuple[Any, ...]] = []
        self._chunks: list[pa.Table] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks)) + len(self._rows)

    def append(self, *row: Any) -> None:
        self._rows.append(row)
        if len(self._rows) == _CHUNK:
            self._flush()

    def table(self) -> pa.Table:
        self._flush()
        return pa.concat_tables(self._chunks)

    def _flush(self) -> None:
        columns = list(zip(*self._rows, strict=True)) or [()] * len(self._schema)
        self._chunks.append(
            pa.Table.from_pydict(dict(zip(self._schema.names, columns, strict=True)), self._schema)
        )
        self._rows = []


def rows_of(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """The rows of a table, a few of them at a time as Python objects."""
    for batch in table.to_batches(max_chunksize=_CHUNK):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


class Items(Columns):
    """A list of items that grows; ``table`` is as SCHEMA says."""

    def __init__(self) -> None:
        super().__init__(SCHEMA)

    def add(
        self, split: str, label: int | None, place: bytes, size: int, block: int = -1, key: str = ""
    ) -> None:
        """``key`` must be unique in its split; none takes the item's number."""
        self.append(key or f"{split}-{len(self):08d}", split, label, place, size, block)


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
    found: Sequence[str] = ()
    """What the source turned out to be, in words; some may be empty."""
    embedding_shape: list[int] = field(default_factory=list)
    """[D] or [T, D] of the texts' embeddings, where there are any."""

    def describe(self) -> str:
        counts = [
            f"{part['values']} {part['counts']}"
            for part in pc.value_counts(self.items["split"]).to_pylist()
        ]
        parts = [
            *self.found,
            f"{len(self.items)} images ({', '.join(counts)})",
            f"{len(self.class_names)} classes",
            f"{len(self.attribute_names)} attributes" if self.attribute_names else "",
            f"embeddings of shape {self.embedding_shape}" if self.embedding_shape else "",
            f"{len(self.rejects)} rejected so far ({self.rejects[0].source}: {self.rejects[0].reason})"
            if self.rejects
            else "",
        ]
        return ", ".join(part for part in parts if part)


class Reader(Protocol):
    """A dataset as it lies on disk. To open one is cheap and reads nothing that grows with the number of images."""

    def listing(self) -> Listing:
        """All images. Raises InputError when the source is missing, empty or of another kind."""
        ...

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """These items' records, each completely decoded; what cannot be goes to ``rejects`` with the reason.

        WorkError when the source was changed after it was listed; ``newest`` and ``embedding_shape`` are from the listing.
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
        chosen[members[order[: round(share * len(members))]]] = True
    return chosen


def number_classes(names: Iterable[str]) -> list[str]:
    """Distinct names in order: as numbers when all of them are."""
    distinct = set(names)
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return sorted(distinct, key=int)
    return sorted(distinct)
