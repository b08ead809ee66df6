"""Read files at an address: a folder, or any URL that fsspec supports (http, s3, gs, …).

Every failure is a WorkError that names the address: the store failed, the user's input was right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, BinaryIO

from r2id.errors import WorkError


def open_stream(address: str, file: str) -> BinaryIO:
    """Open a file below the address for reading from its start."""
    with _reading(address, file) as (system, path):
        return system.open(path, "rb")


def read_file(address: str, file: str) -> bytes:
    """Read a whole file below the address."""
    with _reading(address, file) as (system, path):
        return system.cat_file(path)


def read_range(address: str, file: str, start: int, size: int) -> bytes:
    """Read ``size`` bytes of a file below the address from ``start`` on, fewer at its end."""
    with _reading(address, file) as (system, path):
        data = system.cat_file(path, start=start, end=start + size)
    # A server without range requests answers with the whole file.
    return data if len(data) <= size else data[start : start + size]


@contextmanager
def _reading(address: str, file: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system and the file's path in it; turn any failure into a WorkError."""
    where = f"{address.rstrip('/')}/{file}"
    try:
        system, base = _file_system(address, os.getpid())
        yield system, f"{base.rstrip('/')}/{file}"
    except FileNotFoundError:
        raise WorkError(f"{where}: no such file") from None
    except Exception as error:  # every store raises errors of its own
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise WorkError(f"{where}: cannot be read: {reason}") from error


@lru_cache(maxsize=8)
def _file_system(address: str, _process: int) -> tuple[Any, str]:
    """Open a file system once per process: network ones use threads, which a fork does not copy."""
    import fsspec

    return fsspec.core.url_to_fs(address)
