"""CelebA (Liu et al., "Deep learning face attributes in the wild", ICCV 2015), as published or as copied to Kaggle.

202,599 faces with 40 attributes (±1), 10,177 identities, landmarks, and a partition into train, val and test. The aligned
images are 178×218 (width × height); bounding boxes belong to the others, "in the wild".
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from data_prep.base import Items, Listing, digest_of
from data_prep.files import FileRecords, first_existing, read_table
from data_prep.sources import is_image, open_source
from r2id.data.files import sha256_file
from r2id.data.shards import Reject
from r2id.errors import InputError, WorkError

_FOLDERS = ("", "Anno", "Eval", "Img")
_IMAGES = {"aligned": ("img_align_celeba/img_align_celeba", "img_align_celeba", "img_align_celeba.zip"),
           "wild": ("img_celeba/img_celeba", "img_celeba", "img_celeba.zip")}
_TABLES = {  # name → files, with how many lines they have before the rows: count and header, or nothing
    "attributes": ({"list_attr_celeba.txt": 2, "list_attr_celeba.csv": 1}, True),
    "partition": ({"list_eval_partition.txt": 0, "list_eval_partition.csv": 1}, True),
    "identity": ({"identity_CelebA.txt": 0, "identity_CelebA.csv": 1}, False),
    "landmarks": ({}, False),
    "box": ({"list_bbox_celeba.txt": 2, "list_bbox_celeba.csv": 1}, False)}
_LANDMARKS = {"aligned": "list_landmarks_align_celeba", "wild": "list_landmarks_celeba"}
_COLUMNS = {"identity": 1, "partition": 1, "box": 4, "landmarks": 10}
_SPLITS = ("train", "val", "test")


@dataclass
class Table:
    """One annotation file: rows of integers by image."""

    path: Path
    columns: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)
    values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int32))
    """int32 [rows, columns]."""

    def of(self, name: str) -> np.ndarray:
        return self.values[self.rows[name]]


class CelebaReader(FileRecords):
    """``label`` is what the class of a sample is: "none", "identity", or the name of an attribute (no 0, yes 1)."""

    def __init__(self, source: Path | None, unpacked: Path, max_pixels: int, images: Literal["aligned", "wild"] = "aligned",
                 label: str = "none") -> None:
        if source is None:
            raise InputError("source: missing: dataset 'celeba' needs the folder of its files")
        if not source.is_dir():
            raise InputError(f"source {source}: no such folder")
        found = first_existing(source, _FOLDERS, _IMAGES[images])
        if found is None:
            raise InputError(f"source {source}: has no {images} images: none of {', '.join(_IMAGES[images])}, also not in "
                             f"{', '.join(filter(None, _FOLDERS))}")
        super().__init__(open_source(found, unpacked), max_pixels)
        self.root, self.images, self.label = source, images, label
        self._tables: dict[str, Table] | None = None

    def listing(self) -> Listing:
        tables = self.tables
        names = self._class_names(tables)
        files = self.source.files(is_image)
        rejects, items = list(files.rejects), Items()
        known = tables["partition"].rows
        needed = [tables[name] for name in ("attributes", "partition", *(["identity"] if self.label == "identity" else []))]
        seen = set()
        for entry in files.entries:
            name = PurePosixPath(entry.name).name
            missing = next((table.path.name for table in needed if name not in table.rows), None)
            if missing or name in seen:
                rejects.append(Reject("", entry.name, f"not in {missing}" if missing else "another image of this name"))
                continue
            seen.add(name)
            split = _SPLITS[int(tables["partition"].of(name)[0])]
            items.add(split, self._label(name, names, tables), entry.place, entry.size)
        if not seen:
            raise InputError(f"source {self.source.path}: none of its {len(files.entries)} images is in "
                             f"{tables['partition'].path}")
        rejects += [Reject(_SPLITS[int(tables["partition"].of(name)[0])], name, f"in {tables['partition'].path.name}, but "
                           "there is no such image") for name in known if name not in seen]
        digest = digest_of([(files.digest.encode(), 0)] + [(sha256_file(table.path).encode(), 0)
                                                           for table in tables.values()])
        newest = max(files.newest, *(table.path.stat().st_mtime_ns for table in tables.values()))
        words = f"CelebA, {self.images} images in {self.source.path}, with {', '.join(sorted(tables))}"
        return Listing(items.table(), digest, newest, names, tables["attributes"].columns, rejects,
                       ", ".join(filter(None, [words, files.words()])))

    def records(self, items: Any, rejects: list[Reject], newest: int) -> Any:
        for table in self.tables.values():
            if table.path.stat().st_mtime_ns > newest:
                raise WorkError(f"{table.path}: changed since the preparation began")
        return super().records(items, rejects, newest)

    def meta(self, name: str) -> dict[str, Any]:
        """Identity, landmarks (pairs of x, y) and, of images in the wild, the box (x, y, width, height), in pixels."""
        key = PurePosixPath(name).name
        found: dict[str, Any] = {}
        for kind in ("identity", "landmarks", "box"):
            table = self.tables.get(kind)
            if table and key in table.rows:
                values = table.of(key).tolist()
                found[kind] = values[0] if kind == "identity" else values
        return found

    def attributes(self, name: str) -> tuple[int, ...]:
        return tuple(self.tables["attributes"].of(PurePosixPath(name).name).tolist())

    @property
    def tables(self) -> dict[str, Table]:
        if self._tables is None:
            self._tables = self._read_tables()
        return self._tables

    def _read_tables(self) -> dict[str, Table]:
        tables = {}
        for kind, (files, needed) in _TABLES.items():
            if kind == "landmarks":
                files = {f"{_LANDMARKS[self.images]}.txt": 2, f"{_LANDMARKS[self.images]}.csv": 1}
            if kind == "box" and self.images != "wild":
                continue
            path = first_existing(self.root, _FOLDERS, list(files))
            if path is not None:
                tables[kind] = _read(path, files[path.name], _COLUMNS.get(kind))
            elif needed or kind == self.label:
                raise InputError(f"source {self.root}: has no {' or '.join(files)}")
        _check_values(tables["attributes"], {-1, 1})
        _check_values(tables["partition"], {0, 1, 2})
        return tables

    def _class_names(self, tables: dict[str, Table]) -> list[str]:
        attributes = tables["attributes"].columns
        if self.label == "none":
            return []
        if self.label == "identity":
            return [str(number) for number in np.unique(tables["identity"].values)]
        if self.label not in attributes:
            near = difflib.get_close_matches(self.label, attributes, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(f"label {self.label!r}: {hint}must be none, identity or one of {', '.join(attributes)}")
        return [f"not {self.label}", self.label]

    def _label(self, name: str, names: Sequence[str], tables: dict[str, Table]) -> int | None:
        if self.label == "none":
            return None
        if self.label == "identity":
            return int(np.searchsorted(np.array(names, dtype=np.int64), tables["identity"].of(name)[0]))
        return int(tables["attributes"].of(name)[tables["attributes"].columns.index(self.label)] > 0)


def _read(path: Path, heading: int, width: int | None) -> Table:
    """InputError naming the line of what is wrong."""
    if path.suffix == ".csv":
        rows = read_table(path)
        columns = list(rows[0])[1:] if rows else []
        lines = [list(row.values()) for row in rows]
        first = 2
    else:
        lines = _split_lines(path)
        count, columns = None, [str(n) for n in range(width or 0)]
        if heading:
            count, columns = _heading(path, lines)
            lines = lines[2:]
        if count is not None and count != len(lines):
            raise InputError(f"{path}: line 1 says {count} rows, but there are {len(lines)}")
        first = heading + 1
    expected = width or len(columns)
    table = Table(path, columns, values=np.empty((len(lines), expected), np.int32))
    for number, line in enumerate(lines):
        if len(line) != expected + 1:
            raise InputError(f"{path}: line {number + first}: {len(line)} columns, not {expected + 1}")
        if line[0] in table.rows:
            raise InputError(f"{path}: line {number + first}: {line[0]!r} for a second time")
        try:
            table.values[number] = [int(value) for value in line[1:]]
        except ValueError:
            raise InputError(f"{path}: line {number + first}: not all of {' '.join(line[1:])!r} are whole numbers") from None
        table.rows[line[0]] = number
    if not table.rows:
        raise InputError(f"{path}: has no rows")
    return table


def _split_lines(path: Path) -> list[list[str]]:
    try:
        return [line.split() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a readable text file: {error}") from None


def _heading(path: Path, lines: list[list[str]]) -> tuple[int, list[str]]:
    if len(lines) < 2 or len(lines[0]) != 1 or not lines[0][0].isdigit():
        raise InputError(f"{path}: line 1: must be the number of rows")
    return int(lines[0][0]), [name for name in lines[1] if name != "image_id"]


def _check_values(table: Table, allowed: set[int]) -> None:
    wrong = np.argwhere(~np.isin(table.values, sorted(allowed)))
    if len(wrong):
        row, column = wrong[0]
        name = next(name for name, number in table.rows.items() if number == row)
        raise InputError(f"{table.path}: {name}: {table.columns[column]} = {table.values[row, column]}: must be one of "
                         f"{', '.join(map(str, sorted(allowed)))}")


