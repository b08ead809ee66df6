"""Files at an address: a folder, or anything that fsspec knows (http, s3, gs, …)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO

from r2id.errors import WorkError


def open_stream(address: str, file: str) -> BinaryIO:
    """A file below the address, to be read from its start. WorkError when it cannot be opened."""
    with _reading(address, file) as (system, path):
        return system.open(path, "rb")


def read_file(address: str, file: str) -> bytes:
    """A whole file below the address. WorkError when it cannot be read."""
    with _reading(address, file) as (system, path):
        return system.cat_file(path)


def read_range(address: str, file: str, start: int, size: int) -> bytes:
    """``size`` bytes of a file below the address; fewer where it ends before. WorkError when it cannot be read."""
    with _reading(address, file) as (system, path):
        data = system.cat_file(path, start=start, end=start + size)
    # A server that knows no ranges answers with the whole file.
    return data if len(data) <= size else data[start : start + size]


@contextmanager
def _reading(address: str, file: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system and the file's path in it; whatever goes wrong becomes a WorkError that names the address."""
    where = f"{address.rstrip('/')}/{file}"
    try:
        system, base = _file_system(address, os.getpid())
        yield system, f"{base.rstrip('/')}/{file}"
    except FileNotFoundError:
        raise WorkError(f"{where}: no such file") from None
    except Exception as error:  # every store has errors of its own
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise WorkError(f"{where}: cannot be read: {reason}") from error


@lru_cache(maxsize=8)
def _file_system(address: str, _process: int) -> tuple[Any, str]:
    """One for each process: those of the network have threads, which a fork does not copy."""
    import fsspec

    return fsspec.core.url_to_fs(address)
