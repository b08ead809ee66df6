"""Read files at an address: a folder, or any URL that fsspec supports (http, s3, gs, …).

Every failure is a WorkError that names the address: the store failed, the user's input was right.
A failure that may pass is first given some time to do so. fsspec itself repeats no request of http.
"""

from __future__ import annotations

import os
import tarfile
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, BinaryIO

from r2id.errors import WorkError
from r2id.progress import say

_WAITS = (1, 2, 4, 8, 16, 30)  # seconds before another try: a minute in all
_SILENCE = 30  # seconds without a byte after which a connection counts as broken
_BUSY = (408, 429)  # HTTP statuses below 500 that may pass: a timeout, too many requests


class Attempts:
    """The tries at reading one file below an address.

    A folder is tried once: its file system waits by itself for what may pass.
    """

    def __init__(self, address: str, file: str) -> None:
        self.where = f"{address.rstrip('/')}/{file}"
        self._waits = _WAITS if "://" in address else ()
        self._failures = 0

    def failed(self, error: Exception, further: bool = False) -> None:
        """Wait for the next try; WorkError if there is none, or the error will not pass.

        ``further`` says that this try came further than those before it, which count no more.
        """
        if further:
            self._failures = 0
        error = _true_error(error)
        words = " ".join([*_kind(error), *str(error).splitlines()[:1]])
        if not _may_pass(error) or self._failures >= len(self._waits):
            what = "no such file" if isinstance(error, FileNotFoundError) else None
            raise WorkError(f"{self.where}: {what or f'cannot be read: {words}'}") from error
        wait = self._waits[self._failures]
        self._failures += 1
        say(f"{self.where}: {words}: trying again in {wait} s")
        time.sleep(wait)


def open_stream(address: str, file: str) -> BinaryIO:
    """Open a file below the address for reading from its start, in one try: see Attempts."""
    system, path = _locate(address, file)
    return system.open(path, "rb")


def read_file(address: str, file: str) -> bytes:
    """Read a whole file below the address."""
    return _read(address, file, lambda system, path: system.cat_file(path))


def read_range(address: str, file: str, start: int, size: int) -> bytes:
    """Read ``size`` bytes of a file below the address from ``start`` on, fewer at its end."""
    data = _read(
        address, file, lambda system, path: system.cat_file(path, start=start, end=start + size)
    )
    # A server without range requests answers with the whole file.
    return data if len(data) <= size else data[start : start + size]


def _read(address: str, file: str, read: Callable[[Any, str], bytes]) -> bytes:
    """Read from fsspec's file system, in as many attempts as it takes."""
    attempts = Attempts(address, file)
    while True:
        try:
            return read(*_locate(address, file))
        except Exception as error:  # every store raises errors of its own
            attempts.failed(error)


def _locate(address: str, file: str) -> tuple[Any, str]:
    """Return fsspec's file system and the path in it of a file below the address."""
    system, base = _file_system(address, os.getpid())
    return system, f"{base.rstrip('/')}/{file}"


@lru_cache(maxsize=8)
def _file_system(address: str, _process: int) -> tuple[Any, str]:
    """Open a file system once per process: network ones use threads, which a fork does not copy."""
    import fsspec

    options: dict[str, Any] = {}
    if address.startswith(("http://", "https://")):
        import aiohttp

        # A shard may be read for as long as its samples are trained on; aiohttp allows 5 minutes.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
        options["client_kwargs"] = {"timeout": timeout}
    return fsspec.core.url_to_fs(address, **options)


def _true_error(error: Exception) -> Exception:
    """Return what is behind fsspec's FileNotFoundError, its word for every failure of http.

    Those of other stores are true, whatever error of the store is behind them.
    """
    import aiohttp

    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, aiohttp.ClientError | OSError):
        return error if getattr(cause, "status", None) == 404 else cause
    return error


def _kind(error: Exception) -> list[str]:
    """Return the name of an error, unless its own words are enough."""
    return [] if isinstance(error, EOFError) else [type(error).__name__]


def _may_pass(error: Exception) -> bool:
    """Return whether another try may succeed: a server was busy, or a connection broke."""
    import aiohttp

    if isinstance(error, aiohttp.ClientResponseError):
        return error.status in _BUSY or error.status >= 500
    return isinstance(
        error,
        TimeoutError
        | ConnectionError
        | EOFError
        | tarfile.ReadError
        | aiohttp.ClientConnectionError
        | aiohttp.ClientPayloadError,
    )
