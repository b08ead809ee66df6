"""Read tables of labels and annotations (CSV or Parquet), and find files in several places."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r2id.errors import InputError


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, values as text) of a CSV or Parquet file, the header first.

    A CSV file whose first line has no comma may be separated by semicolons or tabs.
    Every row is as long as the header. Raises InputError when the file is missing, is neither CSV
    nor Parquet, or has a row of another length.
    """
    try:
        yield from _parquet_rows(path) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a readable CSV or Parquet file: {str(error).splitlines()[0]}"
        ) from None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        # Excel separates by semicolons where numbers have decimal commas.
        first = file.readline()
        delimiter = next((sign for sign in ",;\t" if sign in first), ",")
        reader = csv.reader(itertools.chain([first], file), delimiter=delimiter, strict=True)
        header = next(reader, [])
        yield 1, header
        for row in filter(None, reader):
            if len(row) != len(header):
                raise InputError(
                    f"{path}: line {reader.line_num}: {len(row)} columns, not {len(header)}"
                )
            yield reader.line_num, row


def _parquet_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        yield 1, file.schema_arrow.names
        line = 1
        for batch in file.iter_batches():
            for row in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                line += 1
                yield line, ["" if value is None else str(value) for value in row]


def column_of(header: Sequence[str], names: Sequence[str], path: Path) -> int:
    """Return the number, from 0, of the first column with one of these (lower-case) names.

    Raises InputError when there is none.
    """
    lower = [column.strip().lower() for column in header]
    found = next((lower.index(name) for name in names if name in lower), None)
    if found is None:
        raise InputError(
            f"{path}: no column {' or '.join(map(repr, names))}: it has "
            f"{', '.join(map(repr, header)) or 'none'}"
        )
    return found


def first_existing(root: Path, folders: Sequence[str], names: Sequence[str]) -> Path | None:
    """Return the first of these names, of files or folders, that exists in any of the folders."""
    paths = (root / folder / name for name in names for folder in folders)
    return next((path for path in paths if path.exists()), None)
