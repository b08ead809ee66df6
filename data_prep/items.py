"""The interface of a dataset's reader: a listing of its images, and the records of some of them.

A listing decodes no image, so it takes little time and memory even for millions of them. Records
are made later, shard by shard, in any process.
"""

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
from r2id.errors import InputError

TEST_SHARE = 0.1
"""Share of the images that becomes the test split where the source has no splits of its own."""

_CLASSES_ALLOWED = 100_000  # class numbers, however few samples there are

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
"""Columns of a table of items; see Item."""

_CHUNK = 1 << 14  # rows that exist as Python objects at a time


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source.

    ``place`` locates it in the source, in the reader's own format (a path, an offset in a tar, …).
    ``size`` is an upper bound of its stored bytes. Items of one ``block`` can only be read
    together, so they stay together in the shards; −1 stands for no block.
    """

    key: str
    split: str
    label: int | None
    place: bytes
    size: int
    block: int = -1


class TableBuilder:
    """Builds a table row by row in little memory, because there may be millions of rows."""

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


def iter_rows(table: pa.Table) -> Iterator[tuple[Any, ...]]:
    """Yield the rows of a table, converting a few at a time to Python objects."""
    for batch in table.to_batches(max_chunksize=_CHUNK):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


class ItemTableBuilder(TableBuilder):
    """Builds a table of items; see SCHEMA."""

    def __init__(self) -> None:
        super().__init__(SCHEMA)

    def add(
        self, split: str, label: int | None, place: bytes, size: int, block: int = -1, key: str = ""
    ) -> None:
        """Add an item. ``key`` must be unique in its split; by default it is the item's number."""
        self.append(key or f"{split}-{len(self):08d}", split, label, place, size, block)


@dataclass(frozen=True)
class Listing:
    """The content of a source, in an order that depends on the source alone."""

    items: pa.Table
    """A row per image; see SCHEMA."""
    digest: str
    """Identity of the source's content."""
    newest: int = 0
    """Latest modification time, in nanoseconds; a later one shows that a file has changed since."""
    class_names: list[str] = field(default_factory=list)
    attribute_names: list[str] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    """Files that cannot become samples, as far as this is known without reading them."""
    notes: Sequence[str] = ()
    """Phrases for people that describe the source; some may be empty."""
    embedding_shape: list[int] = field(default_factory=list)
    """[D] or [T, D] of the text embeddings; empty where there are none."""
    hashed: bool = False
    """Whether ``digest`` covers the images' content, not only the names and lengths of files."""

    def describe(self) -> str:
        """Describe the listing in one line."""
        counts = [
            f"{part['values']} {part['counts']}"
            for part in pc.value_counts(self.items["split"]).to_pylist()
        ]
        parts = [
            *self.notes,
            f"{len(self.items)} images ({', '.join(counts)})",
            f"{len(self.class_names)} classes",
            f"{len(self.attribute_names)} attributes" if self.attribute_names else "",
            f"embeddings of shape {self.embedding_shape}" if self.embedding_shape else "",
            f"{len(self.rejects)} rejected so far "
            f"({self.rejects[0].source}: {self.rejects[0].reason})"
            if self.rejects
            else "",
        ]
        return ", ".join(part for part in parts if part)


class Reader(Protocol):
    """Reads a dataset from the files that it is distributed as.

    Opening a reader is cheap, because every process that writes shards opens one: if images are
    files, it reads nothing that grows with their number.
    """

    def listing(self) -> Listing:
        """List all images; InputError when the source is missing, empty or of another kind."""
        ...

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """Yield the records of items; each image is decoded completely to see that it is intact.

        Images that cannot be used are added to ``rejects`` with the reason. ``newest`` and
        ``embedding_shape`` are those of the listing. Raises WorkError when the source has changed
        since it was listed.
        """
        ...


def digest_of(parts: Iterable[tuple[bytes, int]]) -> str:
    """Hash names and lengths. This reads no images, and gives the same for a copy of the source."""
    content = hashlib.sha256()
    for name, size in parts:
        content.update(name + b"\0%d\0" % size)
    return content.hexdigest()


def stratified_test(labels: Iterable[int | None], share: float) -> np.ndarray:
    """Choose a share of all samples for testing: bool [N], the same for the same labels.

    It is as close to the same share of every class as whole samples allow. A class has its only
    sample in it only if there are too few others.
    """
    classes = np.array([-1 if label is None else label for label in labels], dtype=np.int64)
    chosen = np.zeros(len(classes), dtype=bool)
    generator = np.random.Generator(np.random.PCG64(0))
    _, sizes = np.unique(classes, return_counts=True)
    groups = np.split(np.argsort(classes, kind="stable"), np.cumsum(sizes))[:-1]
    for members, count in zip(groups, _apportion(sizes, share), strict=True):
        order = np.argsort(generator.random(len(members)), kind="stable")
        chosen[members[order[:count]]] = True
    return chosen


def _apportion(sizes: np.ndarray, share: float) -> np.ndarray:
    """Divide the share of a total among parts of these sizes, by largest remainders."""
    counts = np.floor(share * sizes).astype(np.int64)
    missing = round(share * float(sizes.sum())) - int(counts.sum())
    ties = np.random.Generator(np.random.PCG64(1)).random(len(sizes))
    # Rounded, because equal remainders of different sizes differ in their last bits.
    remainders = (share * sizes - counts).round(9)
    order = np.lexsort((ties, -remainders, sizes - counts < 2))
    counts[order[: max(missing, 0)]] += 1
    return counts


def check_class_number(number: int, samples: int, where: str) -> None:
    """Raise InputError for a class number far above the number of samples: it is something else."""
    limit = max(_CLASSES_ALLOWED, 10 * samples)
    if number >= limit:
        raise InputError(
            f"{where}: class number {number}, in a source of {samples} samples: must be less than "
            f"{limit}"
        )


def number_occurring(items: pa.Table) -> tuple[pa.Table, list[str], str]:
    """Number the classes of a column ``label`` as they occur, without gaps.

    Returns the table, the names of the classes, which are the numbers they had, and a note for
    people if there were gaps.
    """
    found = pc.unique(items["label"].drop_null()).sort()
    names = [str(number) for number in found.to_pylist()]
    if not names or found[-1].as_py() < len(names):
        return items, names, ""
    labels = pc.index_in(items["label"], value_set=found)
    column = items.schema.get_field_index("label")
    note = f"{len(names)} classes with numbers from {names[0]} to {names[-1]}, numbered anew"
    return items.set_column(column, items.schema.field(column), labels), names, note


def number_classes(names: Iterable[str]) -> list[str]:
    """Return the distinct names in order, numerically when all of them are numbers."""
    distinct = set(names)
    if all(name.removeprefix("-").isdecimal() for name in distinct):
        return sorted(distinct, key=lambda name: (int(name), name))  # 1 and 01 are two
    return sorted(distinct)
