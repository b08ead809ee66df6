"""Write a shard, a tar of records, and its index."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from r2id.data.embeddings import npy_bytes
from r2id.data.index import ATTRIBUTES, EMBEDDING, SCHEMA, read_commit
from r2id.data.manifest import FORMAT_VERSION, Reject, ShardEntry
from r2id.data.records import Record
from r2id.files import atomic_file

_BLOCK = 512  # bytes: a tar header is one block, and contents are padded to whole blocks


def write_shard_files(
    folder: Path, file: str, records: Iterable[Record], rejects: list[Reject]
) -> ShardEntry:
    """Write a tar and, last, its index, which commits it. Equal records give equal bytes.

    Each file appears complete or not at all. ``rejects`` is stored in the index. It is read after
    the last record, so the iterator of records may add to it. Raises ValueError for a key that
    webdataset could confuse with another, WorkError when the disk cannot be written.
    """
    rows: dict[str, list[Any]] = {
        name: [] for name in (*SCHEMA.names, ATTRIBUTES.name, EMBEDDING.name)
    }
    with atomic_file(folder / file) as raw:
        stream = _Hashed(raw)
        _write_tar(stream, records, rows)
    facts = {
        "format_version": FORMAT_VERSION,
        "file": file,
        "samples": len(rows["key"]),
        "bytes": stream.written,
        "sha256": stream.digest.hexdigest(),
        "rejects": [vars(reject) for reject in rejects],
    }
    schema = SCHEMA if None in rows["attributes"] else SCHEMA.append(ATTRIBUTES)
    if any(row is not None for row in rows["embedding"]):
        schema = schema.append(EMBEDDING)
    table = pa.Table.from_pydict(rows, schema.with_metadata({"r2id": json.dumps(facts)}))
    with atomic_file((folder / file).with_suffix(".parquet")) as raw:
        pq.write_table(table, raw, compression="zstd")
    entry, _ = read_commit(folder, file)
    return entry


class _Hashed:
    """A file that hashes what is written to it, so that the tar need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.written = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return self.file.write(data)


def _write_tar(stream: _Hashed, records: Iterable[Record], rows: dict[str, list[Any]]) -> None:
    """Write records to a tar, and add their rows of the index to ``rows``."""
    from webdataset.writer import TarWriter  # imports torch, which nothing else here needs

    # mtime 0 and empty user names make the bytes a function of the records alone. A floating-point
    # mtime would also add PAX headers, which double the size of small samples. When an error occurs
    # inside the block, TarWriter still closes a short tar that looks valid; atomic_file keeps it
    # from getting its final name.
    with TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
        seen: set[str] = set()
        offset = 0
        for record in records:
            _check_key(record.key, seen)
            members = _members(record)
            writer.write({"__key__": record.key, **members})
            # TarWriter stores the members sorted by extension, which determines their offsets.
            for ext in sorted(members):
                if ext == record.ext:
                    _add_row(rows, record, offset + _BLOCK)
                offset += _BLOCK + _padded(len(members[ext]))


def _members(record: Record) -> dict[str, bytes]:
    attributes = {} if record.attributes is None else {"attributes": list(record.attributes)}
    facts = {
        **record.meta,
        **attributes,
        "height": record.height,
        "width": record.width,
        "mode": record.mode,
    }
    members = {record.ext: record.image, "json": json.dumps(facts, sort_keys=True).encode()}
    if record.label is not None:
        members["cls"] = str(record.label).encode()
    if record.embedding is not None:
        members["npy"] = npy_bytes(record.embedding)
    return members


def _add_row(rows: dict[str, list[Any]], record: Record, offset: int) -> None:
    row = (
        record.key,
        offset,
        len(record.image),
        record.height,
        record.width,
        record.mode,
        -1 if record.label is None else record.label,
        record.ext,
        hashlib.sha256(record.image).digest(),
        record.attributes,
        None if record.embedding is None else record.embedding.reshape(-1),
    )
    for name, value in zip(rows, row, strict=True):
        rows[name].append(value)


def _check_key(key: str, seen: set[str]) -> None:
    if not re.fullmatch(r"[\w-]{1,90}", key, re.ASCII):
        raise ValueError(f"key {key!r}: must be 1 to 90 letters, digits, '_' and '-'")
    if key in seen:
        raise ValueError(f"key {key!r}: occurs twice in one shard")
    seen.add(key)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
