"""Read CelebA (Liu et al., "Deep learning face attributes in the wild", ICCV 2015).

202,599 faces with 40 attributes (±1), 10,177 identities, landmarks, and a partition into train, val
and test. The aligned images are 178×218 (width × height); bounding boxes belong to the other set of
images, "in the wild". Both the published text files and Kaggle's CSV files are read. The text files
separate columns by several spaces; some begin with the number of rows and a line of names.
"""

from __future__ import annotations

import difflib
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from data_prep.file_records import FileRecords
from data_prep.items import TEST_SHARE, Item, ItemTableBuilder, Listing, digest_of, stratified_test
from data_prep.sources import Entry, Files, is_image, modified_ns
from data_prep.tables import first_existing, read_rows
from data_prep.tars import open_source
from r2id.data.manifest import Reject
from r2id.data.records import Record
from r2id.errors import InputError, WorkError
from r2id.files import sha256_file

_FOLDERS = ("", "Anno", "Eval", "Img")
_IMAGES = {
    "aligned": ("img_align_celeba/img_align_celeba", "img_align_celeba", "img_align_celeba.zip"),
    "wild": ("img_celeba/img_celeba", "img_celeba", "img_celeba.zip"),
}
_LANDMARKS = {"aligned": "list_landmarks_align_celeba", "wild": "list_landmarks_celeba"}
_TABLES = {
    "attributes": "list_attr_celeba",
    "partition": "list_eval_partition",
    "identity": "identity_CelebA",
    "box": "list_bbox_celeba",
}
# These text files begin with the number of rows and a line of column names, the others do not.
_HEADED = ("attributes", "landmarks", "box")
_COLUMNS = {"identity": 1, "partition": 1, "box": 4, "landmarks": 10}
_ALLOWED = {"attributes": {-1, 1}, "partition": {0, 1, 2}}
_SPLITS = ("train", "val", "test")
_HINT = "(--partial takes what is there)"


@dataclass
class Table:
    """One annotation file: a row of integers per image."""

    path: Path
    columns: list[str]
    rows: dict[str, int]
    values: np.ndarray
    """int32 [rows, columns]."""
    stated: int | None
    """Number of rows that the file says it has, if it says so."""

    def of(self, name: str) -> np.ndarray:
        """Return the row of an image, by its file name."""
        return self.values[self.rows[name]]


class CelebaReader(FileRecords):
    """Reads CelebA.

    ``label`` chooses the class of a sample: "none", "identity", or the name of an attribute, which
    gives the classes 0 (no) and 1 (yes). ``partial`` takes the images that are there and have
    attributes; those without a place in the partition are trained on, and a tenth is set aside for
    testing if it leaves none for that.
    """

    def __init__(
        self,
        source: Path,
        unpacked: Path,
        max_pixels: int,
        images: Literal["aligned", "wild"] = "aligned",
        label: str = "none",
        partial: bool = False,
    ) -> None:
        if not source.is_dir():
            raise InputError(f"source {source}: is no folder")
        found = first_existing(source, _FOLDERS, _IMAGES[images])
        if found is None:
            raise InputError(
                f"source {source}: has no {images} images: none of {', '.join(_IMAGES[images])}, "
                f"also not in {', '.join(filter(None, _FOLDERS))}"
            )
        super().__init__(open_source(found, unpacked), max_pixels)
        self.root, self.images, self.label, self.partial = source, images, label, partial
        self._tables: dict[str, Table] | None = None

    def listing(self) -> Listing:
        """List the images that the partition, the attributes and the table of labels all name."""
        tables = self.tables
        class_names, labels, labelled = self._classes(tables)
        partition = tables.get("partition")
        needed = [tables["attributes"], labelled]
        if partition and not self.partial:
            needed.append(partition)
        files = self.source.files(is_image)
        rejects, kept = self._choose(files, needed)
        if not kept:
            raise InputError(
                f"source {self.source.path}: none of its {len(files)} images is in "
                f"{' and '.join(dict.fromkeys(str(table.path) for table in needed))}"
            )
        found = {PurePosixPath(reject.source).name for reject in rejects} | kept.keys()
        absent = [name for name in (partition or labelled).rows if name not in found]
        notes = [
            f"CelebA, {self.images} images in {self.source.path}, with {', '.join(sorted(tables))}",
            files.note(),
        ]
        if self.partial:
            notes += self._missing(len(rejects), len(absent))
            rejects = list(files.rejects)
        elif partition:
            reason = f"in {partition.path.name}, but there is no such image {_HINT}"
            rejects += [
                Reject(_SPLITS[int(partition.of(name)[0])], name, reason) for name in absent
            ]
        numbers = [None if labels is None else int(labels[labelled.rows[name]]) for name in kept]
        items = ItemTableBuilder()
        for split, label, entry in zip(
            self._splits(list(kept), numbers), numbers, kept.values(), strict=True
        ):
            items.add(split, label, entry.place, entry.size)
        digests = [(sha256_file(table.path).encode(), 0) for table in tables.values()]
        return Listing(
            items.table(),
            digest_of([(files.digest.encode(), 0), *digests]),
            max(files.newest, *(modified_ns(table.path) for table in tables.values())),
            class_names,
            tables["attributes"].columns,
            rejects,
            notes,
        )

    def _choose(
        self, files: Files, needed: Sequence[Table]
    ) -> tuple[list[Reject], dict[str, Entry]]:
        """Return rejects, and the images by name that are in all tables that are needed."""
        rejects, kept = list(files.rejects), dict[str, Entry]()
        for entry in files:
            name = PurePosixPath(entry.name).name
            missing = next((table.path.name for table in needed if name not in table.rows), None)
            if missing:
                rejects.append(Reject("", entry.name, f"not in {missing} {_HINT}"))
            elif name in kept:
                rejects.append(Reject("", entry.name, "another image of this name"))
            else:
                kept[name] = entry
        return rejects, kept

    def _missing(self, left_out: int, absent: int) -> list[str]:
        """Return notes on what is not there."""
        return [
            f"{absent} images of its tables are not there" if absent else "",
            f"{left_out} images left out that its tables do not name" if left_out else "",
            "" if "partition" in self.tables else "no partition",
            *(
                f"{len(table.rows)} of the {table.stated} rows of {table.path.name}"
                for table in self.tables.values()
                if table.stated not in (None, len(table.rows))
            ),
        ]

    def _splits(self, names: Sequence[str], labels: Sequence[int | None]) -> list[str]:
        """Return the split of each image; a tenth is for testing where the partition has none."""
        partition = self.tables.get("partition")
        splits = [
            _SPLITS[int(partition.of(name)[0])] if partition and name in partition.rows else "train"
            for name in names
        ]
        if self.partial and "test" not in splits:
            train = [place for place, split in enumerate(splits) if split == "train"]
            chosen = stratified_test((labels[place] for place in train), TEST_SHARE)
            for place, test in zip(train, chosen, strict=True):
                splits[place] = "test" if test else "train"
        return splits

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """See data_prep.items.Reader."""
        for table in self.tables.values():
            if modified_ns(table.path) > newest:
                raise WorkError(f"{table.path}: changed since the preparation began")
        return super().records(items, rejects, newest, embedding_shape)

    def meta(self, name: str) -> dict[str, Any]:
        """Return identity, landmarks (x, y each) and, for images in the wild, the bounding box.

        The box is (x, y, width, height); all coordinates are pixels.
        """
        key = PurePosixPath(name).name
        meta: dict[str, Any] = {}
        for kind in ("identity", "landmarks", "box"):
            table = self.tables.get(kind)
            if table and key in table.rows:
                values = table.of(key).tolist()
                meta[kind] = values[0] if kind == "identity" else values
        return meta

    def attributes(self, name: str) -> tuple[int, ...]:
        """Return an image's 40 attributes, each −1 or 1."""
        return tuple(self.tables["attributes"].of(PurePosixPath(name).name).tolist())

    @property
    def tables(self) -> dict[str, Table]:
        """The annotation files by kind, read when they are first needed."""
        if self._tables is None:
            self._tables = self._read_tables()
        return self._tables

    def _read_tables(self) -> dict[str, Table]:
        stems = {**_TABLES, "landmarks": _LANDMARKS[self.images]}
        if self.images != "wild":
            del stems["box"]  # boxes refer to the images before they were aligned
        tables = {}
        for kind, stem in stems.items():
            path = first_existing(self.root, _FOLDERS, (f"{stem}.txt", f"{stem}.csv"))
            if path is not None:
                tables[kind] = _read(path, kind, self.partial)
            elif kind in ("attributes", self.label):
                raise InputError(f"source {self.root}: has no {stem}.txt or {stem}.csv")
            elif kind == "partition" and not self.partial:
                raise InputError(f"source {self.root}: has no {stem}.txt or {stem}.csv {_HINT}")
        return tables

    def _classes(self, tables: dict[str, Table]) -> tuple[list[str], np.ndarray | None, Table]:
        """Return the class names, the class of every row of a table (or None), and that table."""
        attributes = tables["attributes"]
        if self.label == "none":
            return [], None, attributes
        if self.label == "identity":
            people, numbers = np.unique(tables["identity"].values[:, 0], return_inverse=True)
            return [str(person) for person in people], numbers, tables["identity"]
        if self.label not in attributes.columns:
            near = difflib.get_close_matches(self.label, attributes.columns, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"label {self.label!r}: {hint}must be none, identity or one of "
                f"{', '.join(attributes.columns)}"
            )
        values = attributes.values[:, attributes.columns.index(self.label)]
        return [f"not {self.label}", self.label], values > 0, attributes


def _read(path: Path, kind: str, partial: bool) -> Table:
    """Read an annotation file; InputError names the faulty line.

    Of a file that says that it has more rows, ``partial`` takes those that are there.
    """
    lines = read_rows(path) if path.suffix == ".csv" else _text_rows(path)
    count, columns = None, [kind] * _COLUMNS.get(kind, 0)
    if path.suffix == ".csv":
        columns = next(lines)[1][1:]
    elif kind in _HEADED:
        count, columns = _heading(path, lines)
    width, allowed = _COLUMNS.get(kind, len(columns)), _ALLOWED.get(kind)
    rows: dict[str, int] = {}
    values = array("i")
    for line, (name, *words) in lines:
        if len(words) != width:
            raise InputError(f"{path}: line {line}: {len(words) + 1} columns, not {width + 1}")
        if name in rows:
            raise InputError(f"{path}: line {line}: {name!r} for a second time")
        try:
            numbers = [int(word) for word in words]
            values.extend(numbers)
        except (ValueError, OverflowError):
            raise InputError(
                f"{path}: line {line}: not all of {' '.join(words)!r} are whole numbers"
            ) from None
        if allowed and not allowed.issuperset(numbers):
            column, value = next(
                pair for pair in zip(columns, numbers, strict=True) if pair[1] not in allowed
            )
            raise InputError(
                f"{path}: line {line}: {column} = {value}: must be one of "
                f"{', '.join(map(str, sorted(allowed)))}"
            )
        rows[sys.intern(name)] = len(rows)  # keeps one copy of the names, which all tables share
    if count is not None and count != len(rows) and not (partial and count > len(rows)):
        hint = f" {_HINT}" if count > len(rows) else ""
        raise InputError(f"{path}: line 1 says {count} rows, but there are {len(rows)}{hint}")
    if not rows or not width:
        raise InputError(f"{path}: has no {'columns' if rows else 'rows'}")
    return Table(path, columns, rows, np.frombuffer(values, np.int32).reshape(-1, width), count)


def _text_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, words) of every line that is not blank."""
    try:
        with path.open(encoding="utf-8") as file:
            yield from (
                (number, words)
                for number, line in enumerate(file, start=1)
                if (words := line.split())
            )
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file: {error}") from None


def _heading(path: Path, lines: Iterator[tuple[int, list[str]]]) -> tuple[int, list[str]]:
    """Read the number of rows and the column names from the first two lines."""
    _, first = next(lines, (1, []))
    if len(first) != 1 or not first[0].isdecimal():
        raise InputError(f"{path}: line 1: must be the number of rows")
    _, names = next(lines, (2, []))
    return int(first[0]), [name for name in names if name != "image_id"]
