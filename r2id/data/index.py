"""The index of one shard: a Parquet file with a row per sample that also commits the shard.

A row holds the offset and size of the image in the tar, so reading a sample takes one positioned
read. The metadata holds the tar's hash. The index is written after the tar, so a tar without one is
unfinished.
"""

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
# Last columns, only in sets that have attributes or embeddings.
ATTRIBUTES = pa.field("attributes", pa.list_(pa.int8()))
EMBEDDING = pa.field("embedding", pa.list_(pa.float16()))  # flat; see Manifest.embedding_shape


def read_commit(folder: Path, file: str) -> tuple[ShardEntry, list[Reject]]:
    """Read a shard's manifest entry and rejects from the metadata of its index.

    Raises FileNotFoundError when there is no index, ValueError when it cannot be read.
    """
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
    """Return a shard's entry if it is committed and its tar has the right hash, else None."""
    try:
        entry, _ = read_commit(folder, file)
        return entry if sha256_file(folder / file) == entry.sha256 else None
    except (OSError, ValueError):
        return None


def read_index(folder: Path, entry: ShardEntry, columns: list[str] | None = None) -> pa.Table:
    """Read the rows of one shard, or some columns of them.

    Columns are key, offset and size (of the image in the tar), height, width, mode, label (−1:
    none), ext and sha256 (of the image); and, where the set has them, attributes (−1 or 1 each) and
    embedding (flattened).
    """
    # From memory and in this thread: Arrow's threads that read Python's files may free a buffer
    # while Python exits, which aborts the process.
    raw = pa.BufferReader((folder / entry.index_file).read_bytes())
    return pq.ParquetFile(raw).read(columns, use_threads=False).replace_schema_metadata()
