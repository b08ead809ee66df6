"""Read ImageNet from Hugging Face's Parquet files, with columns image{bytes,path} and label."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.file_records import image_record
from data_prep.folder import SPLITS
from data_prep.items import (
    Item,
    ItemTableBuilder,
    Listing,
    check_class_number,
    digest_of,
    number_occurring,
)
from data_prep.sources import modified_ns, raise_if_system
from r2id.data.manifest import Reject
from r2id.data.records import Record
from r2id.errors import InputError, WorkError

_PARQUET = re.compile(r"(train|validation|val|test)-\d+-of-(\d+).*\.parquet")


class ParquetImagenet:
    """Reads Hugging Face's Parquet files.

    A row group can only be read as a whole, so its images are kept together in the shards: they are
    one block (see data_prep.items.Item).
    """

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels, self.files = folder, max_pixels, parquet_files(folder)

    def listing(self) -> Listing:
        """List all rows. Only the labels are read; sizes are means over a row group."""
        items, names, newest, block = ItemTableBuilder(), list[str](), 0, 0
        total = sum(_open_parquet(path).metadata.num_rows for path in self.files)
        parts: list[tuple[bytes, int]] = []
        for number, path in enumerate(self.files):
            split = SPLITS[path.name.split("-")[0]]
            newest = max(newest, path.stat().st_mtime_ns)
            file = _open_parquet(path)
            names = names or _hub_names(file)
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                labels = _read_column(file, path, group, "label")
                highest = max((label for label in labels if label is not None), default=-1)
                check_class_number(highest, total, f"{path}: row group {group}")
                size = _mean_size(facts)
                parts.append(
                    (f"{path.name} {group} {facts.total_byte_size}".encode(), facts.num_rows)
                )
                for row, label in enumerate(labels):
                    labelled = label is not None and label >= 0  # the test split has −1
                    items.add(
                        split,
                        label if labelled else None,
                        b"%d:%d:%d" % (number, group, row),
                        size,
                        block,
                    )
                block += 1
        table = items.table()
        note = ""
        if len(names) <= (pc.max(table["label"]).as_py() or 0):
            table, names, note = number_occurring(table)
        return Listing(
            table,
            digest_of(parts),
            newest,
            names,
            notes=["ImageNet in Parquet files", *self._missing(), note],
        )

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        _embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """See data_prep.items.Reader. Each row group is read once, as long as its items adjoin."""
        held: tuple[int, int] | None = None
        images: list[dict[str, Any] | None] = []
        problem = ""  # why the row group that is held cannot be read
        for item in items:
            number, group, row = map(int, item.place.split(b":"))
            path = self.files[number]
            name = f"{path.name} row group {group} row {row}"
            try:
                if held != (number, group):
                    held, problem = (number, group), ""
                    try:
                        images = self._read(path, group, item.size, newest)
                    except InputError as error:
                        problem = str(error)
                if problem:
                    raise ValueError(problem)
                image = images[row]
                name = (image or {}).get("path") or name
                if not image or image.get("bytes") is None:
                    raise ValueError("the row has no image bytes")
                yield image_record(item, image["bytes"], self.max_pixels, {"source": name})
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def _read(self, path: Path, group: int, size: int, newest: int) -> list[dict[str, Any] | None]:
        """Read the images of a row group; WorkError when the file has changed since the listing."""
        if modified_ns(path) > newest:
            raise WorkError(f"{path}: changed since the preparation began")
        with _open_parquet(path) as file:
            if group >= file.num_row_groups or _mean_size(file.metadata.row_group(group)) != size:
                raise WorkError(f"{path}: changed since the preparation began")
            return _read_column(file, path, group, "image")

    def _missing(self) -> list[str]:
        """Return notes on how many files of each split are there, and on missing splits."""
        parts = Counter(
            (found[1], int(found[2]))
            for path in self.files
            if (found := _PARQUET.fullmatch(path.name))
        )
        splits = {SPLITS[split] for split, _ in parts}
        return [
            *(f"{count} of {total} {split} files" for (split, total), count in parts.items()),
            *(f"no {split} images" for split in ("train", "val") if split not in splits),
        ]


def _mean_size(group: pq.RowGroupMetaData) -> int:
    """Return the mean size of a row group's images; single sizes are only known after reading."""
    return -(-group.total_byte_size // max(group.num_rows, 1))


def parquet_files(folder: Path) -> list[Path]:
    """Return the files of a folder that are named as Hugging Face names ImageNet's, sorted."""
    return (
        sorted(path for path in folder.glob("*.parquet") if _PARQUET.fullmatch(path.name))
        if folder.is_dir()
        else []
    )


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path.open("rb"))  # pyarrow itself takes no path but of UTF-8
    except (OSError, pa.ArrowException) as error:
        raise_if_system(error, path)
        raise InputError(
            f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from None
    missing = {"image", "label"} - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path}: no column {' and '.join(map(repr, sorted(missing)))}")
    return file


def _read_column(file: pq.ParquetFile, path: Path, group: int, column: str) -> list[Any]:
    try:
        return file.read_row_group(group, columns=[column])[column].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise_if_system(error, path)
        raise InputError(
            f"{path}: row group {group} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def _hub_names(file: pq.ParquetFile) -> list[str]:
    """Return the class names, if Hugging Face's library has stored them in the schema."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"][
            "features"
        ]
        return list(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return []
