"""Shard sets: the one tar writer, the manifest, and indexed reads.

A set is a folder::

    manifest.json                      what there is, with checksums; written last
    plan.json, plan.parquet            what was to go where
    rejects.csv                        source files that are no images, each with the reason; only when there are any
    <split>/shard-000000.tar           members KEY.jpg|png|webp, KEY.cls where there is a class, KEY.npy where there is a
                                       text's embedding, KEY.json for the rest
    <split>/shard-000000.parquet       index of that tar, one row per sample, and its commit marker

Any webdataset reader streams the tars. Here a sample is one positioned read, its place taken from the index.

What the index costs: 45 to 80 bytes a sample on disk, of which the hash is 32, and 72 in memory, of which 47 are columns
that are read (offset, size, height, width, label, shard, key) and the rest is the allocator's; the plan of an epoch takes 60
more. So 1.28 million samples take 92 MB, and 173 MB with a plan (tests/bench/data.py plan). 10⁹ samples would take 72 GB in
every process, and are split instead: the index is a file per shard (4,000 shards of 250,000 samples), and an order by shards
(data.shuffle = "shards") needs those of 16 shards at a time, 4 million samples in 290 MB. Global are then only the
permutation of the shards, the manifest's counts and the sizes of the buckets, which one pass over the indexes gives; the
step to resume at names a group of shards and a place in it.

Text embeddings are in the index too, float16, and where they are asked for they are all kept: N × their shape × 2 bytes in
every process. So 1.28 million pooled ones of CLIP ([768]) take 2 GB, and as many sequences ([77, 768]) 151 GB.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from r2id.data.embeddings import DTYPE, npy_bytes
from r2id.data.files import atomic_file, sha256_file, write_atomic
from r2id.data.records import Record
from r2id.data.remote import read_range
from r2id.errors import InputError, WorkError

FORMAT_VERSION = 1
MANIFEST, REJECTS, PLAN = "manifest.json", "rejects.csv", "plan.json"

_BLOCK = 512  # of a tar: a header is one block, contents are padded to whole ones
_OPEN_FILES = 256  # per split and process, well below the usual limit of 1024
_SCHEMA = pa.schema([
    ("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("height", pa.int32()), ("width", pa.int32()),
    ("mode", pa.string()), ("label", pa.int32()), ("ext", pa.string()), ("sha256", pa.binary(32))])
_ATTRIBUTES = pa.field("attributes", pa.list_(pa.int8()))  # these are the last columns of sets that have them
_EMBEDDING = pa.field("embedding", pa.list_(pa.float16()))  # flat; Manifest.embedding_shape


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardEntry(_Strict):
    """One shard. ``file`` is relative to the set, ``bytes`` and ``sha256`` are the tar's."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        return str(Path(self.file).with_suffix(".parquet"))


class SplitEntry(_Strict):
    samples: int
    bytes: int
    shards: list[ShardEntry]


class Manifest(_Strict):
    """``checksum`` is of all other fields, so that an edited manifest is noticed."""

    format_version: int
    dataset: str
    source_digest: str
    class_names: list[str]
    rejects: int
    splits: dict[str, SplitEntry]
    attribute_names: list[str] = []
    embedding_shape: list[int] = []
    """[D] or [T, D] of the texts' embeddings, where there are any."""
    rejects_sha256: str = ""
    checksum: str = ""

    def expected_checksum(self) -> str:
        content = self.model_dump(exclude={"checksum", *self._absent()})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Manifest:
        """The commit of the whole set. Returns the manifest with its checksum."""
        sealed = self.model_copy(update={"checksum": self.expected_checksum()})
        write_atomic(folder / MANIFEST, (sealed.model_dump_json(indent=1, exclude=self._absent()) + "\n").encode())
        return sealed

    def _absent(self) -> set[str]:
        """What a set need not have is then not in its manifest."""
        return {name for name in ("attribute_names", "embedding_shape", "rejects_sha256") if not getattr(self, name)}


@dataclass(frozen=True)
class Reject:
    """A source file that cannot become a sample."""

    split: str
    source: str
    reason: str


# ---------------------------------------------------------------------------------------------------------- writing


def shard_file(split: str, number: int) -> str:
    return f"{split}/shard-{number:06d}.tar"


def write_shard_files(folder: Path, file: str, records: Iterable[Record], rejects: list[Reject]) -> ShardEntry:
    """Write a tar and, last, its index. Either is complete or absent, and the same records give the same bytes.

    ``rejects`` is read when the records are used up: it may be filled while they are made.
    Raises ValueError for a key that webdataset could not tell from another, WorkError when the disk refuses.
    """
    rows: dict[str, list[Any]] = {name: [] for name in (*_SCHEMA.names, _ATTRIBUTES.name, _EMBEDDING.name)}
    with atomic_file(folder / file) as raw:
        stream = _Hashed(raw)
        _write_tar(stream, records, rows)
    facts = {"format_version": FORMAT_VERSION, "file": file, "samples": len(rows["key"]), "bytes": stream.written,
             "sha256": stream.digest.hexdigest(), "rejects": [vars(reject) for reject in rejects]}
    schema = _SCHEMA if None in rows["attributes"] else _SCHEMA.append(_ATTRIBUTES)
    if any(row is not None for row in rows["embedding"]):
        schema = schema.append(_EMBEDDING)
    table = pa.Table.from_pydict(rows, schema.with_metadata({"r2id": json.dumps(facts)}))
    with atomic_file((folder / file).with_suffix(".parquet")) as raw:
        pq.write_table(table, raw, compression="zstd")
    entry, _ = read_commit(folder, file)
    return entry


def read_commit(folder: Path, file: str) -> tuple[ShardEntry, list[Reject]]:
    """What a shard's index says of it. Raises FileNotFoundError or ValueError when there is none to read."""
    path = (folder / file).with_suffix(".parquet")
    try:
        with path.open("rb") as raw:
            facts = json.loads(pq.read_schema(raw).metadata[b"r2id"])
        entry = ShardEntry(file=file, samples=facts["samples"], bytes=facts["bytes"], sha256=facts["sha256"],
                           index_sha256=sha256_file(path))
        return entry, [Reject(**reject) for reject in facts["rejects"]]
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"unreadable index: {str(error).splitlines()[0]}") from None


def find_intact(folder: Path, file: str) -> ShardEntry | None:
    """The shard's entry when it is committed and its tar hashes as it should."""
    try:
        entry, _ = read_commit(folder, file)
        return entry if sha256_file(folder / file) == entry.sha256 else None
    except (OSError, ValueError):
        return None


class _Hashed:
    """Passes writes on and hashes them."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest, self.written = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.written += len(data)
        return self.file.write(data)


def _write_tar(stream: _Hashed, records: Iterable[Record], rows: dict[str, list[Any]]) -> None:
    from webdataset.writer import TarWriter  # imports torch, which nothing else in here needs

    # An integer mtime avoids PAX headers; with it and without names of users the bytes depend on the records alone.
    # Closed in any case, so that it does not try later; what an error leaves is never renamed to its final name.
    with TarWriter(stream, encoder=False, mtime=0, user="", group="") as writer:
        seen: set[str] = set()
        offset = 0
        for record in records:
            _check_key(record.key, seen)
            members = _members(record)
            writer.write({"__key__": record.key, **members})
            for ext in sorted(members):  # the order in which TarWriter stores them
                if ext == record.ext:
                    _add_row(rows, record, offset + _BLOCK)
                offset += _BLOCK + _padded(len(members[ext]))


def _members(record: Record) -> dict[str, bytes]:
    attributes = {} if record.attributes is None else {"attributes": list(record.attributes)}
    facts = {**record.meta, **attributes, "height": record.height, "width": record.width, "mode": record.mode}
    members = {record.ext: record.image, "json": json.dumps(facts, sort_keys=True).encode()}
    if record.label is not None:
        members["cls"] = str(record.label).encode()
    if record.embedding is not None:
        members["npy"] = npy_bytes(record.embedding)
    return members


def _add_row(rows: dict[str, list[Any]], record: Record, offset: int) -> None:
    row = (record.key, offset, len(record.image), record.height, record.width, record.mode,
           -1 if record.label is None else record.label, record.ext, hashlib.sha256(record.image).digest(),
           record.attributes, None if record.embedding is None else record.embedding.reshape(-1))
    for name, value in zip(rows, row, strict=True):
        rows[name].append(value)


def _check_key(key: str, seen: set[str]) -> None:
    if not re.fullmatch(r"[\w-]{1,90}", key, re.ASCII):
        raise ValueError(f"key {key!r}: must be 1 to 90 letters, digits, '_' and '-'")
    if key in seen:
        raise ValueError(f"key {key!r}: twice in one shard")
    seen.add(key)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


# ---------------------------------------------------------------------------------------------------------- reading


def read_manifest(folder: Path) -> Manifest:
    """InputError when the folder is no shard set, an unfinished one, or one of another format version."""
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise InputError(f"{folder}: an unfinished shard set: run the same r2id prepare again to complete it")
        what = "not a shard set (no manifest.json): give a folder written by r2id prepare"
        raise InputError(f"{folder}: {what if folder.is_dir() else 'no such folder'}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """InputError, naming where the content is from, when it is no manifest, or one of another format version."""
    try:
        table = json.loads(content)
        version = table.get("format_version") if isinstance(table, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(f"{where}: format version {version!r}: this r2id reads version {FORMAT_VERSION}")
        return Manifest.model_validate(table)
    except (ValidationError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: damaged or edited: {str(error).splitlines()[0]}") from None


def read_index(folder: Path, entry: ShardEntry, columns: list[str] | None = None) -> pa.Table:
    """The rows of one shard: key, offset, size, height, width, mode, label (−1: none), ext, sha256 of the image, and
    attributes (a list of −1 and 1) and embedding (a list of floats) where the set has them."""
    with (folder / entry.index_file).open("rb") as raw:
        return pq.read_table(raw, columns=columns).replace_schema_metadata()


@dataclass(eq=False)
class Split:
    """The samples of one split, in shard order: arrays of length N, one element per sample.

    ``label`` is −1 where there is no class; ``height`` and ``width`` are pixels after orientation.
    """

    name: str
    files: list[Path]
    entries: list[ShardEntry]
    address: str | None
    """Where the tars are when they are not in the folder."""
    keys: pa.Array
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    attributes: np.ndarray | None = None
    """int8 [N, A], −1 or 1, of sets that have them (Manifest.attribute_names)."""
    embedding: np.ndarray | None = None
    """float16 [N, D] or [N, T, D], of sets that have them (Manifest.embedding_shape), where they are asked for."""
    _open: dict[int, BinaryIO] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay in their process

    def key(self, index: int) -> str:
        return self.keys[int(index)].as_py()

    def in_shard(self, number: int) -> np.ndarray:
        """Indices of the samples of one shard, int64."""
        first, end = np.searchsorted(self.shard, [number, number + 1])
        return np.arange(first, end)

    def read(self, index: int) -> bytes:
        """The stored bytes of one image. WorkError when the shard has been cut short or taken away."""
        number, offset, size = int(self.shard[index]), int(self.offset[index]), int(self.size[index])
        if self.address is None:
            data = os.pread(self._file(number).fileno(), size, offset)
        else:
            data = read_range(self.address, self.entries[number].file, offset, size)
        if len(data) != size:
            raise WorkError(f"{self.files[number]}: cut short at sample {self.key(index)}: r2id verify tells more")
        return data

    def _file(self, number: int) -> BinaryIO:
        if number not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[number] = self.files[number].open("rb", buffering=0)
            except OSError as error:
                raise WorkError(f"{self.files[number]}: cannot be read: {error.strerror}") from error
        return self._open[number]


class ShardSet:
    """An open shard set."""

    def __init__(self, folder: Path, manifest: Manifest, address: str | None = None, embeddings: bool = False) -> None:
        self.folder, self.manifest, self.address, self.embeddings = folder, manifest, address, embeddings
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, folder: Path, address: str | None = None, embeddings: bool = False) -> ShardSet:
        """InputError when the folder is no complete shard set, or shards are missing or of another length.

        With an address (a folder or URL, see r2id.data.remote) the tars are there, and the folder holds the rest. With
        ``embeddings`` the splits have those of the texts, where the set does; else their memory is saved."""
        manifest = read_manifest(folder)
        if manifest.checksum != manifest.expected_checksum():
            raise InputError(f"{folder / MANIFEST}: edited or damaged: its checksum does not fit its content")
        for entry in (entry for split in manifest.splits.values() for entry in split.shards):
            path = folder / entry.file
            if not (folder / entry.index_file).is_file() or not (address or path.is_file()):
                raise InputError(f"{path}: missing, it or its index: run the same r2id prepare again")
            if not address and path.stat().st_size != entry.bytes:
                raise InputError(f"{path}: {path.stat().st_size} bytes instead of {entry.bytes}: run the same "
                                 "r2id prepare again")
        return cls(folder, manifest, address, embeddings)

    @property
    def digest(self) -> str:
        """Identity of the data: one hexadecimal digest of all that the manifest states."""
        return self.manifest.checksum

    @property
    def class_names(self) -> list[str]:
        return self.manifest.class_names

    @property
    def num_classes(self) -> int:
        return len(self.manifest.class_names)

    def summary(self) -> dict[str, Any]:
        """Counts, for people: samples per split, shards, bytes, classes, rejects."""
        splits = self.manifest.splits
        return {"dataset": self.manifest.dataset, "digest": self.digest,
                "samples": {name: split.samples for name, split in splits.items()},
                "shards": sum(len(split.shards) for split in splits.values()),
                "bytes": sum(split.bytes for split in splits.values()),
                "classes": self.num_classes, "rejects": self.manifest.rejects}

    def split(self, name: str) -> Split:
        """InputError when the set has no such split, or none of its samples."""
        entry = self.manifest.splits.get(name)
        if entry is None or not entry.samples:
            raise InputError(f"{self.folder}: no split {name!r}: it has {', '.join(self.manifest.splits)}")
        if name not in self._splits:
            self._splits[name] = self._load(name, entry)
        return self._splits[name]

    def _load(self, name: str, entry: SplitEntry) -> Split:
        """Filled shard by shard into arrays of their final size: all tables at once would take twice the memory."""
        columns: dict[str, Any] = {column: np.empty(entry.samples, _SCHEMA.field(column).type.to_pandas_dtype())
                                          for column in ("offset", "size", "height", "width", "label")}
        number, keys, first = np.empty(entry.samples, np.int32), [], 0
        lists = self._lists(entry.samples)
        for position, shard in enumerate(entry.shards):
            try:
                table = read_index(self.folder, shard, ["key", *columns, *(lists if shard.samples else ())])
            except (OSError, pa.ArrowException) as error:
                raise InputError(f"{self.folder / shard.index_file}: unreadable: {str(error).splitlines()[0]}") from None
            end = first + shard.samples
            if len(table) != shard.samples or end > entry.samples:
                raise InputError(f"{self.folder}/{name}: the indexes do not fit the manifest: r2id verify tells more")
            for column, values in columns.items():
                values[first:end] = table[column].to_numpy()
            for column, values in lists.items() if shard.samples else ():  # an empty index need not have the column
                flat = table[column].combine_chunks().flatten().to_numpy()
                values[first:end] = flat.reshape(shard.samples, *values.shape[1:])
            number[first:end] = position
            keys.append(table["key"].combine_chunks())
            first = end
        return Split(name=name, files=[self.folder / shard.file for shard in entry.shards], entries=entry.shards,
                     address=self.address, keys=pa.concat_arrays(keys), shard=number,
                     attributes=lists.get("attributes"), embedding=lists.get("embedding"), **columns)

    def _lists(self, samples: int) -> dict[str, np.ndarray]:
        """Of each column that holds lists, and that is wanted, the array that it is to fill."""
        named, shape = len(self.manifest.attribute_names), self.manifest.embedding_shape
        lists = {"attributes": np.empty((samples, named), np.int8)} if named else {}
        return {**lists, "embedding": np.empty((samples, *shape), DTYPE)} if shape and self.embeddings else lists


def duplicates(values: Iterable[str]) -> list[str]:
    """Those that occur more than once."""
    return [value for value, count in Counter(values).items() if count > 1]
