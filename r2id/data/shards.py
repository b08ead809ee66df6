"""Open shard sets and read samples from them. r2id.data.manifest describes their format.

Reading a sample takes one positioned read of a tar, at the offset in the shard's index. So any
order of samples costs the same, and a resumed run begins at its step without reading earlier ones.

Memory: in every process the index takes 72 bytes per sample, and the plan of an epoch 60 more.
1.28 million samples take 92 MB, and 173 MB with a plan (tests/bench/data.py plan). On disk the
index takes 45 to 80 bytes per sample, 32 of them the hash. 10⁹ samples would take 72 GB per
process. That could be avoided where training visits a few shards at a time (data.shuffle =
"shards"), because each shard has an index file of its own.

Text embeddings are in the index too, as float16. When a set is opened with them, every process
keeps all of them in memory: 1.28 million pooled CLIP embeddings ([768]) take 2 GB, as many
sequences ([77, 768]) take 151 GB.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from r2id.data.embeddings import DTYPE
from r2id.data.index import SCHEMA, read_index
from r2id.data.manifest import MANIFEST, Manifest, ShardEntry, SplitEntry, read_manifest
from r2id.data.remote import read_range
from r2id.errors import InputError, WorkError
from r2id.files import sha256_file

_OPEN_FILES = 256  # per split and process, well below the usual limit of 1024


@dataclass(eq=False)
class Split:
    """The samples of one split, in shard order: arrays of length N, one element per sample.

    ``shard`` is the number of a sample's shard, ``offset`` and ``size`` locate its image in the
    tar. ``height`` and ``width`` are those of the upright image. ``label`` is −1 without a class.
    """

    name: str
    files: list[Path]
    entries: list[ShardEntry]
    address: str | None
    """Where the tars are, if not in the set's folder; see r2id.data.remote."""
    keys: pa.Array
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    height: np.ndarray
    width: np.ndarray
    label: np.ndarray
    attributes: np.ndarray | None = None
    """int8 [N, A], −1 or 1, for sets that have Manifest.attribute_names."""
    embedding: np.ndarray | None = None
    """float16 [N, D] or [N, T, D], for sets opened with their text embeddings."""
    _open: dict[int, BinaryIO] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.offset)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay in their process

    def key(self, index: int) -> str:
        """Return the key of a sample, which names its members in the tar; unique in the split."""
        return self.keys[int(index)].as_py()

    def indices_in_shard(self, number: int) -> np.ndarray:
        """Return the indices, int64, of the samples in one shard."""
        first, end = np.searchsorted(self.shard, [number, number + 1])
        return np.arange(first, end)

    def read(self, index: int) -> bytes:
        """Read the stored bytes of one image; WorkError when its shard is missing or cut short."""
        number, offset, size = (
            int(self.shard[index]),
            int(self.offset[index]),
            int(self.size[index]),
        )
        if self.address is None:
            data = os.pread(self._file(number).fileno(), size, offset)
        else:
            data = read_range(self.address, self.entries[number].file, offset, size)
        if len(data) != size:
            raise WorkError(
                f"{self.files[number]}: cut short at sample {self.key(index)}: "
                "r2id verify tells more"
            )
        return data

    def check_content(self, number: int) -> None:
        """Raise WorkError when a shard's tar, if it is here, is not the one that was prepared."""
        file = self.files[number]
        if self.address is None and sha256_file(file) != self.entries[number].sha256:
            raise WorkError(
                f"{file}: its content is not what r2id prepare wrote: r2id verify tells more"
            )

    def _file(self, number: int) -> BinaryIO:
        """Open a shard's tar, or return the open file; the one opened first is closed if needed."""
        if number not in self._open:
            if len(self._open) >= _OPEN_FILES:
                self._open.pop(next(iter(self._open))).close()
            try:
                self._open[number] = self.files[number].open("rb", buffering=0)
            except OSError as error:
                raise WorkError(
                    f"{self.files[number]}: cannot be read: {error.strerror}"
                ) from error
        return self._open[number]


class ShardSet:
    """An open shard set."""

    def __init__(
        self, folder: Path, manifest: Manifest, address: str | None = None, embeddings: bool = False
    ) -> None:
        self.folder, self.manifest, self.address, self.embeddings = (
            folder,
            manifest,
            address,
            embeddings,
        )
        self._splits: dict[str, Split] = {}

    @classmethod
    def open(cls, folder: Path, address: str | None = None, embeddings: bool = False) -> ShardSet:
        """Open a shard set.

        With ``address`` (a folder or URL, see r2id.data.remote) the tars are read from there, and
        the folder need only hold the manifest and the indexes. With ``embeddings`` the splits have
        their text embeddings, which take memory. Raises InputError when the folder is not a
        complete shard set, or a shard is missing or has a wrong length. Only r2id verify checks
        hashes.
        """
        manifest = read_manifest(folder)
        if manifest.checksum != manifest.expected_checksum():
            raise InputError(
                f"{folder / MANIFEST}: edited or damaged: its checksum does not fit its content"
            )
        for entry in (entry for split in manifest.splits.values() for entry in split.shards):
            path = folder / entry.file
            if not (folder / entry.index_file).is_file() or not (address or path.is_file()):
                raise InputError(
                    f"{path}: missing, it or its index: run the same r2id prepare again"
                )
            if not address and path.stat().st_size != entry.bytes:
                raise InputError(
                    f"{path}: {path.stat().st_size} bytes instead of {entry.bytes}: run the same "
                    "r2id prepare again"
                )
        return cls(folder, manifest, address, embeddings)

    @property
    def digest(self) -> str:
        """Identity of the data: a hexadecimal hash of the manifest's content."""
        return self.manifest.checksum

    @property
    def class_names(self) -> list[str]:
        return self.manifest.class_names

    @property
    def num_classes(self) -> int:
        return len(self.manifest.class_names)

    def summary(self) -> dict[str, Any]:
        """Return figures to show: samples per split, shards, bytes, classes and rejects."""
        splits = self.manifest.splits
        return {
            "dataset": self.manifest.dataset,
            "digest": self.digest,
            "samples": {name: split.samples for name, split in splits.items()},
            "shards": sum(len(split.shards) for split in splits.values()),
            "bytes": sum(split.bytes for split in splits.values()),
            "classes": self.num_classes,
            "rejects": self.manifest.rejects,
        }

    def split(self, name: str) -> Split:
        """Return a split; InputError when the set has no such split, or the split is empty."""
        entry = self.manifest.splits.get(name)
        if entry is None or not entry.samples:
            filled = [name for name, entry in self.manifest.splits.items() if entry.samples]
            problem = f"split {name!r} is empty" if entry else f"no split {name!r}"
            raise InputError(f"{self.folder}: {problem}: it has {', '.join(filled)}")
        if name not in self._splits:
            self._splits[name] = self._load(name, entry)
        return self._splits[name]

    def _load(self, name: str, entry: SplitEntry) -> Split:
        """Load the indexes of a split into arrays of their final size, shard by shard.

        Concatenating all tables at the end would take twice the memory.
        """
        columns: dict[str, Any] = {
            column: np.empty(entry.samples, SCHEMA.field(column).type.to_pandas_dtype())
            for column in ("offset", "size", "height", "width", "label")
        }
        numbers, keys, first = np.empty(entry.samples, np.int32), [], 0
        lists = self._lists(entry.samples)
        for number, shard in enumerate(entry.shards):
            try:
                table = read_index(
                    self.folder, shard, ["key", *columns, *(lists if shard.samples else ())]
                )
            except (OSError, pa.ArrowException) as error:
                raise InputError(
                    f"{self.folder / shard.index_file}: unreadable: {str(error).splitlines()[0]}"
                ) from None
            end = first + shard.samples
            if len(table) != shard.samples or end > entry.samples:
                raise InputError(
                    f"{self.folder}/{name}: the indexes do not fit the manifest: "
                    "r2id verify tells more"
                )
            for column, values in columns.items():
                values[first:end] = table[column].to_numpy()
            # The index of an empty shard may lack the attributes and embeddings columns.
            for column, values in lists.items() if shard.samples else ():
                flat = table[column].combine_chunks().flatten().to_numpy()
                values[first:end] = flat.reshape(shard.samples, *values.shape[1:])
            numbers[first:end] = number
            keys.append(table["key"].combine_chunks())
            first = end
        return Split(
            name=name,
            files=[self.folder / shard.file for shard in entry.shards],
            entries=entry.shards,
            address=self.address,
            keys=pa.concat_arrays(keys),
            shard=numbers,
            attributes=lists.get("attributes"),
            embedding=lists.get("embedding"),
            **columns,
        )

    def _lists(self, samples: int) -> dict[str, np.ndarray]:
        """Allocate the arrays of attributes and embeddings, if the splits are to have them."""
        count, shape = len(self.manifest.attribute_names), self.manifest.embedding_shape
        lists = {"attributes": np.empty((samples, count), np.int8)} if count else {}
        return (
            {**lists, "embedding": np.empty((samples, *shape), DTYPE)}
            if shape and self.embeddings
            else lists
        )
