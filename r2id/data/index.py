"""The index of one shard: a row per sample, and what commits the shard."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from r2id.data.manifest import Reject, ShardEntry
from r2id.files import sha256_file

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("mode", pa.string()),
        ("label", pa.int32()),
        ("ext", pa.string()),
        ("sha256", pa.binary(32)),
    ]
)
ATTRIBUTES = pa.field(
    "attributes", pa.list_(pa.int8())
)  # these are the last columns of sets that have them
EMBEDDING = pa.field("embedding", pa.list_(pa.float16()))  # flat; Manifest.embedding_shape


def read_commit(folder: Path, file: str) -> tuple[ShardEntry, list[Reject]]:
    """What a shard's index says of it. Raises FileNotFoundError or ValueError when there is none to read."""
    path = (folder / file).with_suffix(".parquet")
    try:
        with path.open("rb") as raw:
            facts = json.loads(pq.read_schema(raw).metadata[b"r2id"])
        entry = ShardEntry(
            file=file,
            samples=facts["samples"],
            bytes=facts["bytes"],
            sha256=facts["sha256"],
            index_sha256=sha256_file(path),
        )
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


def read_index(folder: Path, entry: ShardEntry, columns: list[str] | None = None) -> pa.Table:
    """The rows of one shard: key, offset, size, height, width, mode, label (−1: none), ext, sha256 of the image, and
    attributes (a list of −1 and 1) and embedding (a list of floats) where the set has them."""
    with (folder / entry.index_file).open("rb") as raw:
        return pq.read_table(raw, columns=columns).replace_schema_metadata()
