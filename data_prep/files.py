"""Records of images that are files of a source; the parts that such readers have in common."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.base import Item
from data_prep.sources import Source
from r2id.data.records import Record, as_png, inspect
from r2id.data.shards import Reject
from r2id.errors import InputError

_BYTES_PER_PIXEL = 16
"""More than any readable format needs for one, uncompressed; larger files are not read."""


def image_record(item: Item, data: bytes, max_pixels: int, meta: Mapping[str, Any],
                 attributes: tuple[int, ...] | None = None) -> Record:
    """Decode completely. JPEG, PNG and WebP keep their bytes, whatever their names say; others become PNG.

    ValueError with the reason when the bytes are no readable image of at most so many pixels.
    """
    facts = inspect(data, max_pixels)
    if facts.ext is None:
        data = as_png(data)
    return Record(item.key, data, facts.ext or "png", facts.height, facts.width, facts.mode, item.label, dict(meta),
                  attributes)


class FileRecords:
    """Items whose places are those of a source."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def records(self, items: Sequence[Item], rejects: list[Reject], newest: int) -> Iterator[Record]:
        for item in items:
            name = name_of(item.place)
            try:
                data = read_item(self.source, item, self.max_pixels, newest)
                yield image_record(item, data, self.max_pixels, {"source": name, **self.meta(name)}, self.attributes(name))
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def meta(self, _name: str) -> dict[str, Any]:
        """What else is known of a file."""
        return {}

    def attributes(self, _name: str) -> tuple[int, ...] | None:
        return None


def read_item(source: Source, item: Item, max_pixels: int, newest: int) -> bytes:
    """ValueError when the item cannot be read, or is longer than any image of so many pixels."""
    limit = max_pixels * _BYTES_PER_PIXEL
    if item.size > limit:
        raise ValueError(f"{item.size} bytes, more than an image of the pixels allowed can have ({limit})")
    return source.read(item.place, item.size, newest)


def name_of(place: bytes) -> str:
    """The name in a place, of a folder or an archive."""
    head, _, tail = place.partition(b":")
    offset, _, name = tail.partition(b":")
    return os.fsdecode(name if head.isdigit() and offset.isdigit() else place)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV or Parquet file, all values as text. InputError when it is neither."""
    try:
        if path.suffix.lower() == ".parquet":
            table = pq.read_table(path)
            return [{key: "" if value is None else str(value) for key, value in row.items()} for row in table.to_pylist()]
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise InputError(f"{path}: line {number}: another number of columns than the header")
    return rows


def column_of(rows: Sequence[Mapping[str, str]], names: Sequence[str], path: Path) -> str:
    """Which of these names, in lower case, the table has a column of. InputError when it has none."""
    present = list(rows[0]) if rows else []
    found = next((column for name in names for column in present if column.strip().lower() == name), None)
    if found is None:
        raise InputError(f"{path}: no column {' or '.join(map(repr, names))}: it has "
                         f"{', '.join(map(repr, present)) or 'none'}")
    return found


def first_existing(root: Path, folders: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first of these files or folders, below any of the folders."""
    paths = (root / folder / name for name in names for folder in folders)
    return next((path for path in paths if path.exists()), None)
