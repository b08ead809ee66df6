"""Files that are complete or absent: written under another name, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from r2id.errors import InputError, WorkError

TEMPORARY = ".tmp"
"""Ending of the names of files that are not complete yet."""
NOISE_SHIFT_FILE = "noise-shift.json"
"""File of a run directory: the noise shift that was applied to its checkpoint."""
_CHUNK = 1 << 20


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends, or is removed on an error.

    A reader finds the old content or the new one, never a part of it. With ``durable``, that holds
    after a power cut too; without, two waits for the disk are saved. Makes the folder if it does
    not exist. Raises WorkError when the file cannot be written, say because the disk is full.
    """
    # Not named after the process: processes of several machines or containers may share a number.
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        if durable:
            fsync(temporary)
        temporary.replace(path)
        if durable:
            fsync(path.parent)
    except OSError as error:
        raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # an earlier error is the one to report
            temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a whole file; see atomic_file."""
    with atomic_file(path, durable) as file:
        file.write(data)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Make a folder that becomes ``path`` when the block ends, or is removed on an error.

    What is at ``path`` then is replaced. A reader finds the old content, none, or the new one,
    never a part of it, after a power cut too. Yields the folder to write into, which is beside
    ``path``. Raises WorkError when it cannot be written, or another process is writing it.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links)
    temporary, old = (path.with_name(f".{path.name}.{state}") for state in ("new", "old"))
    with exclusive(temporary):
        _empty(temporary)  # what a killed process has left there
        try:
            yield temporary
            for inner in (*temporary.rglob("*"), temporary):
                fsync(inner)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            fsync(path.parent)
        except BaseException as error:
            if old.exists() and not path.exists():
                old.rename(path)
            _empty(temporary)
            if isinstance(error, OSError):
                raise WorkError(f"{path}: cannot be written: {error.strerror or error}") from error
            raise
        shutil.rmtree(old, ignore_errors=True)


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(path: Path, content: object, *, allow_nan: bool = True) -> None:
    """Write a JSON file that people may read too; see atomic_file."""
    text = json.dumps(content, indent=1, allow_nan=allow_nan) + "\n"
    write_atomic(path, text.encode())


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to disk: it survives a power cut.

    A renamed file is found under its new name for certain only when its folder was flushed too.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Be the only process that works in a folder, within this block. Makes it if it is missing.

    If nothing came into a folder that this has made, it is removed again, with those above it.
    Raises WorkError at once when another process does, and when the folder cannot be made. The lock
    is the system's, on the folder itself, and ends with the process, however that dies. On a file
    system that knows no locks there is none.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: exists and is no folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise WorkError(f"{folder}: cannot be written: {error.strerror or error}") from error
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WorkError(
                f"{folder}: another process is at work there; wait for its end, or choose another "
                "folder"
            ) from None
        except OSError:
            pass
        yield
    finally:
        with suppress(OSError):  # raised when one is not empty
            for path in made:
                path.rmdir()
        _held.discard(descriptor)
        os.close(descriptor)


def _let_go() -> None:
    """Close locks in a forked process: they are its parent's, and must end with that one."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


_held: set[int] = set()
os.register_at_fork(after_in_child=_let_go)


def sweep(folder: Path) -> None:
    """Remove incomplete files of killed processes from a folder and its subfolders."""
    for leftover in folder.rglob(f"*{TEMPORARY}"):
        leftover.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's content, which is read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def step_folders(root: Path, content: str) -> list[Path]:
    """List the folders in ``root`` that are named step-NUMBER and hold a file ``content``, by name.

    Copies with other names, such as step-00000020-backup, are their owner's.
    """
    return sorted(
        folder
        for folder in root.glob("step-*")
        if re.fullmatch("step-[0-9]+", folder.name) and (folder / content).is_file()
    )


def step_of(folder: Path) -> int:
    """Return the number in the name of one of ``step_folders``."""
    return int(folder.name.removeprefix("step-"))
