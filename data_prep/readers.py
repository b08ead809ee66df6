"""The readers by name."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from data_prep.base import Reader
from r2id.errors import WorkError


def open_reader(dataset: str, source: Path | None, downloads: Path) -> Reader:
    """InputError when the source is missing, empty or no such dataset. Imports are of the one that is needed."""
    if dataset == "digits":
        from data_prep.digits import open_digits
        return open_digits(source)
    if dataset == "mnist":
        from data_prep.mnist import open_mnist
        return open_mnist(source, downloads)
    from data_prep.folder import FolderReader
    return FolderReader(source)


@lru_cache(maxsize=1)
def reopen_reader(dataset: str, source: Path | None, downloads: Path, digest: str) -> Reader:
    """A reader of the source that had this digest when the work was planned, kept for the next shard of it."""
    reader = open_reader(dataset, source, downloads)
    if reader.digest != digest:
        raise WorkError(f"source {source}: changed since the preparation began")
    return reader
