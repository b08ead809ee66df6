"""The files of a shard set, and the manifest that lists them.

A shard set is a folder::

    manifest.json                  splits, shards, counts and checksums; written last
    plan.json, plan.parquet        the shard plan: which image goes into which shard
    rejects.csv                    unusable source files with the reasons, if there are any
    <split>/shard-000000.tar       members KEY.jpg|png|webp (image), KEY.cls (class, if any),
                                   KEY.npy (text embedding, if any), KEY.json (all else)
    <split>/shard-000000.parquet   index of that tar, one row per sample, and its commit marker

Any webdataset reader can stream the tars. r2id reads single samples at the offsets in the index.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from r2id.errors import InputError
from r2id.files import write_atomic

FORMAT_VERSION = 1
MANIFEST, REJECTS, PLAN = "manifest.json", "rejects.csv", "plan.json"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ShardEntry(_Strict):
    """One shard. ``file`` is relative to the set; ``bytes`` and ``sha256`` are the tar's."""

    file: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str

    @property
    def index_file(self) -> str:
        """Path of the shard's index, relative to the set."""
        return str(Path(self.file).with_suffix(".parquet"))


class SplitEntry(_Strict):
    """One split: its shards in order, and the totals of their samples and bytes."""

    samples: int
    bytes: int
    shards: list[ShardEntry]


class Manifest(_Strict):
    """Describes the whole content of a shard set.

    ``checksum`` is the hash of all other fields. It reveals an edited manifest, and identifies the
    data as ShardSet.digest.
    """

    format_version: int
    dataset: str
    source_digest: str
    class_names: list[str]
    rejects: int
    splits: dict[str, SplitEntry]
    attribute_names: list[str] = []
    embedding_shape: list[int] = []
    """Shape [D] or [T, D] of the text embeddings; empty where there are none."""
    rejects_sha256: str = ""
    checksum: str = ""

    def expected_checksum(self) -> str:
        """Hash all fields that the checksum covers."""
        content = self.model_dump(exclude={"checksum", *self._empty_fields()})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> Manifest:
        """Write manifest.json, which commits the whole set; return it with its checksum."""
        sealed = self.model_copy(update={"checksum": self.expected_checksum()})
        write_atomic(
            folder / MANIFEST,
            (sealed.model_dump_json(indent=1, exclude=self._empty_fields()) + "\n").encode(),
        )
        return sealed

    def _empty_fields(self) -> set[str]:
        """Return the names of optional fields that are empty: file and hash leave them out.

        Manifests that were written before these fields existed therefore keep their checksums.
        """
        return {
            name
            for name in ("attribute_names", "embedding_shape", "rejects_sha256")
            if not getattr(self, name)
        }


@dataclass(frozen=True)
class Reject:
    """A source file that cannot become a sample, and why."""

    split: str
    source: str
    reason: str


def shard_file(split: str, number: int) -> str:
    """Return the path of a shard, relative to its set."""
    return f"{split}/shard-{number:06d}.tar"


def read_manifest(folder: Path) -> Manifest:
    """Read a set's manifest.

    Raises InputError when the folder is not a shard set, or is unfinished or of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if (folder / PLAN).is_file():
            raise InputError(
                f"{folder}: an unfinished shard set: run the same r2id prepare again to complete it"
            )
        what = "not a shard set (no manifest.json): give a folder written by r2id prepare"
        raise InputError(f"{folder}: {what if folder.is_dir() else 'no such folder'}")
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest read from ``where``; InputError when it is damaged or of another version."""
    try:
        table = json.loads(content)
        version = table.get("format_version") if isinstance(table, dict) else None
        if version != FORMAT_VERSION:
            raise InputError(
                f"{where}: format version {version!r}: this r2id reads version {FORMAT_VERSION}"
            )
        return Manifest.model_validate(table)
    except (ValidationError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: damaged or edited: {str(error).splitlines()[0]}") from None
