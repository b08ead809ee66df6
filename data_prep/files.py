"""Records of images that are files of a source; the parts that such readers have in common."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.base import Item
from data_prep.embeddings import split_place
from data_prep.sources import Source
from r2id.data.embeddings import parse_npy, to_stored
from r2id.data.manifest import Reject
from r2id.data.records import Record, as_png, inspect
from r2id.errors import InputError

_BYTES_PER_PIXEL = 16
"""More than any readable format needs for one, uncompressed; larger files are not read."""


def image_record(
    item: Item,
    data: bytes,
    max_pixels: int,
    meta: Mapping[str, Any],
    attributes: tuple[int, ...] | None = None,
    embedding: np.ndarray | None = None,
) -> Record:
    """Decode completely. JPEG, PNG and WebP keep their bytes, whatever their names say; others become PNG.

    ValueError with the reason when the bytes are no readable image of at most so many pixels.
    """
    facts = inspect(data, max_pixels)
    if facts.ext is None:
        data = as_png(data)
    return Record(
        item.key,
        data,
        facts.ext or "png",
        facts.height,
        facts.width,
        facts.mode,
        item.label,
        dict(meta),
        attributes,
        embedding,
    )


def embedding_of(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """The content of a ``.npy`` file as it is stored. ValueError with the reason when it is no embedding of this shape."""
    try:
        return to_stored(parse_npy(data), shape)
    except ValueError as error:
        raise ValueError(f"its embedding: {error}") from None


class FileRecords:
    """Items whose places are those of a source."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        for item in items:
            place, told = split_place(item.place)
            name = self.source.name(place)
            try:
                check_length(item.size, self.max_pixels)
                data = self.source.read(place, item.size, newest)
                embedding = (
                    embedding_of(self.source.read(*told, newest), embedding_shape) if told else None
                )
                yield image_record(
                    item,
                    data,
                    self.max_pixels,
                    {"source": name, **self.meta(name)},
                    self.attributes(name),
                    embedding,
                )
            except InputError:  # of the source, not of one image
                raise
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def meta(self, _name: str) -> dict[str, Any]:
        """What else is known of a file."""
        return {}

    def attributes(self, _name: str) -> tuple[int, ...] | None:
        return None


def check_length(size: int, max_pixels: int) -> None:
    """ValueError when a file is longer than any image of so many pixels."""
    limit = max_pixels * _BYTES_PER_PIXEL
    if size > limit:
        raise ValueError(
            f"{size} bytes, more than an image of the pixels allowed can have ({limit})"
        )


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line, values as text) of a CSV or Parquet file: first the header, then the rows, each as long as the header.

    InputError when it is neither.
    """
    try:
        yield from _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}"
        ) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)
        header = next(reader, [])
        yield 1, header
        for row in filter(None, reader):
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {reader.line_num}: {len(row)} columns, not {len(header)}"
                )
            yield reader.line_num, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with pq.ParquetFile(path) as file:
        yield 1, file.schema_arrow.names
        line = 1
        for batch in file.iter_batches():
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                line += 1
                yield line, ["" if value is None else str(value) for value in row]


def column_of(header: Sequence[str], names: Sequence[str], path: Path) -> int:
    """The number of the column that has one of these names, in lower case. InputError when none has."""
    lower = [column.strip().lower() for column in header]
    found = next((lower.index(name) for name in names if name in lower), None)
    if found is None:
        raise InputError(
            f"{path}: no column {' or '.join(map(repr, names))}: it has "
            f"{', '.join(map(repr, header)) or 'none'}"
        )
    return found


def first_existing(root: Path, folders: Sequence[str], names: Sequence[str]) -> Path | None:
    """The first of these files or folders, below any of the folders."""
    paths = (root / folder / name for name in names for folder in folders)
    return next((path for path in paths if path.exists()), None)
