"""Sources of image files: folders and zips here, tars in data_prep.tars.

Archives are read without unpacking them. No file is ever written to a path that an archive names,
so a malicious archive cannot write outside its folder.
"""

from __future__ import annotations

import errno
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import features

from data_prep.items import TableBuilder, digest_of, iter_rows
from r2id.data.manifest import Reject
from r2id.errors import SYSTEM_FAULTS, InputError, WorkError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_OTHERS = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
_OPTIONAL = {"avif": (".avif",), "jpg_2000": (".jp2", ".j2k", ".jpx")}
"""Suffixes of formats that not every Pillow decodes, by what it calls the format."""
IMAGE_SUFFIXES = {
    *_JPEG,
    *_OTHERS,
    *(
        suffix
        for name, suffixes in _OPTIONAL.items()
        # An older Pillow does not know the name, and would warn of it.
        if name in {**features.modules, **features.codecs} and features.check(name)
        for suffix in suffixes
    ),
}
_NAMED = 5  # kinds of files that were left out, of which a note gives the numbers

_LEFT_OUT = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN"}
"""Folders in which systems keep previews, deleted files and the like."""

Keep = Callable[[str], bool]
"""Returns whether to list a file with this name."""

_SCHEMA = pa.schema(
    [("name", pa.binary()), ("size", pa.int64()), ("place", pa.binary()), ("modified", pa.int64())]
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source: its path in the source, its length, and the place to read it from.

    ``modified`` is its modification time in nanoseconds, or its archive's.
    """

    name: str
    size: int
    place: bytes
    modified: int


class Files:
    """The files of a source. Iteration yields an Entry for each, sorted by the bytes of the names.

    In a source of several parts the entries are sorted within each part.
    """

    def __init__(self) -> None:
        self.skipped: Counter[str] = Counter()
        """Number of files that were left out because of their names, by suffix."""
        self.other_folders: set[str] = set()
        """Folders that hold such files, or nothing."""
        self.rejects: list[Reject] = []
        self._found = TableBuilder(_SCHEMA)
        self.table = _SCHEMA.empty_table()
        """Columns name, size, place and modified, a row per file; see Entry."""

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Entry]:
        return (Entry(os.fsdecode(name), *facts) for name, *facts in iter_rows(self.table))

    @property
    def newest(self) -> int:
        """Latest modification time of the entries, in nanoseconds."""
        return pc.max(self.table["modified"]).as_py() or 0

    def add(self, name: str, size: int, place: bytes, modified: int) -> None:
        """Add a file. Entries are visible only after ``sort``."""
        self._found.append(os.fsencode(name), size, place, modified)

    def skip(self, name: str) -> None:
        """Count a file that is left out."""
        suffix = PurePosixPath(name).suffix.lower()
        self.skipped["hidden" if is_hidden(name) else suffix or "without a suffix"] += 1
        self.other_folders.add(name.rpartition("/")[0])

    def sort(self) -> None:
        """Sort the entries of a part once all are added; repeated names become rejects."""
        table = self._found.table()
        self._found = TableBuilder(_SCHEMA)
        table = table.take(pc.sort_indices(table, [("name", "ascending")]))
        names = table["name"].combine_chunks()
        repeated = np.append(
            False,
            pc.equal(names[1:], names[: max(len(names) - 1, 0)]).to_numpy(zero_copy_only=False),
        )
        if repeated.any():
            self.rejects += [
                Reject("", os.fsdecode(name), "twice in the archive")
                for name in names.filter(pa.array(repeated[: len(names)])).to_pylist()
            ]
            table = table.filter(pa.array(~repeated))
        self.table = pa.concat_tables([self.table, pa.table(table.columns, schema=_SCHEMA)])

    def part(self, keep: Keep) -> Files:
        """Return the entries with names to keep, as Files of their own."""
        part = Files()
        part.skipped, part.other_folders = self.skipped, self.other_folders
        part.table = self.table.filter(pa.array([keep(entry.name) for entry in self], pa.bool_()))
        return part

    @property
    def digest(self) -> str:
        """Hash of all names and lengths."""
        return digest_of((os.fsencode(entry.name), entry.size) for entry in self)

    def note(self) -> str:
        """Return a note on which files were left out; empty if none were."""
        return describe_skipped(self.skipped)


class Source(Protocol):
    """A folder or archive of files. Opening one is cheap and lists nothing."""

    path: Path
    kind: str
    """A few words for people, such as "a zip"."""

    def files(self, keep: Keep) -> Files:
        """List the files with names to keep; InputError when the source cannot be listed."""
        ...

    def name(self, place: bytes) -> str:
        """Return the name of the file at a place."""
        ...

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        """Read the bytes at a place; ``size`` and ``newest`` are those of the listing.

        Raises ValueError when they cannot be read, WorkError when they have changed since then.
        """
        ...


def describe_skipped(skipped: Counter[str]) -> str:
    """Say how many files were left out, by suffix; empty if none were."""
    kinds = [f"{count} {suffix}" for suffix, count in skipped.most_common(_NAMED)]
    others = sum(count for _, count in skipped.most_common()[_NAMED:])
    if others:
        kinds.append(f"{others} others")
    return f"left out: {' and '.join(kinds)}" if kinds else ""


def is_image(name: str) -> bool:
    """Return whether a file is an image, by its suffix; hidden files are not."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Return whether a file, or a folder that it is in, is hidden or belongs to a system.

    Notebooks keep copies in ``.ipynb_checkpoints``, and macOS leaves a ``._x.jpg``, which is no
    image, beside each ``x.jpg`` in an archive, or below ``__MACOSX``.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part in _LEFT_OUT
        for part in name.split("/")
    )


class Folder:
    """A folder and its subfolders; a place is a path relative to it.

    Links are followed. Each folder is entered only once, so that cycles of links end.
    """

    kind = "a folder"

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"source {path}: no such folder")
        self.path = path

    def files(self, keep: Keep) -> Files:
        files = Files()
        self._walk(self.path, "", files, keep, set())
        files.sort()
        return files

    def name(self, place: bytes) -> str:
        return os.fsdecode(place)

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        path = self.path / os.fsdecode(place)
        try:
            with path.open("rb") as file:
                facts = os.fstat(file.fileno())
                if facts.st_size != size or facts.st_mtime_ns > newest:
                    raise WorkError(f"{path}: changed since the preparation began")
                return file.read()
        except FileNotFoundError:
            raise WorkError(f"{path}: gone since the preparation began") from None
        except OSError as error:
            raise_if_system(error, path)
            raise ValueError(f"cannot be read: {error.strerror}") from None

    def _walk(
        self, folder: Path, prefix: str, files: Files, keep: Keep, seen: set[tuple[int, int]]
    ) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                children = sorted(found, key=lambda child: os.fsencode(child.name))
            if not children:
                files.other_folders.add(prefix.removesuffix("/"))
            for child in children:
                name = prefix + child.name
                if _is(child.is_dir):
                    if not is_hidden(child.name):
                        self._walk(folder / child.name, f"{name}/", files, keep, seen)
                elif keep(name):
                    self._add(child, name, files)
                else:
                    files.skip(name)
        except OSError as error:
            raise InputError(
                f"{error.filename or folder}: cannot be listed: {error.strerror}"
            ) from None

    @staticmethod
    def _add(child: os.DirEntry[str], name: str, files: Files) -> None:
        if _is(child.is_file):
            facts = child.stat()
            files.add(name, facts.st_size, os.fsencode(name), facts.st_mtime_ns)
        else:
            files.rejects.append(
                Reject("", name, "a link to nothing" if child.is_symlink() else "no regular file")
            )


class Zip:
    """A zip archive; a place is ``OFFSET:NAME``, because names need not be unique."""

    kind = "a zip"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[int, zipfile.ZipInfo] = {}

    def files(self, keep: Keep) -> Files:
        files, modified = Files(), modified_ns(self.path)
        for member in self._opened().infolist():
            name = member.filename
            if member.is_dir():
                continue
            if not keep(name):
                files.skip(name)
                continue
            link = stat.S_IFMT(member.external_attr >> 16) == stat.S_IFLNK
            reason = unsafe_name(name) or (
                "a link" if link else "encrypted" if member.flag_bits & 1 else ""
            )
            if reason:
                files.rejects.append(Reject("", name, reason))
            else:
                place = b"%d:" % member.header_offset + os.fsencode(name)
                files.add(name, member.file_size, place, modified)
        files.sort()
        return files

    def name(self, place: bytes) -> str:
        return os.fsdecode(place.partition(b":")[2])

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        if modified_ns(self.path) > newest:
            raise WorkError(f"{self.path}: changed since the preparation began")
        archive = self._opened()
        member = self._members.get(int(place.partition(b":")[0]))
        if member is None or member.filename != self.name(place) or member.file_size != size:
            raise WorkError(
                f"{self.path}: changed since the preparation began ({self.name(place)})"
            )
        try:
            with archive.open(member) as file:
                data = file.read(size + 1)
        except MemoryError:
            raise
        except Exception as error:  # zipfile and its decompressors fail in many ways on damage
            raise_if_system(error, self.path)
            raise ValueError(f"cannot be read: {error}") from None
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes, not the {size} that the archive states")
        return data

    def _opened(self) -> zipfile.ZipFile:
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self.path)
                members = self._archive.infolist()
                # Some programs of Windows separate folders by backslashes, against the format. In
                # an archive of another program, a name may hold a backslash of its own.
                if not any("/" in member.filename for member in members):
                    for member in members:
                        member.filename = member.filename.replace("\\", "/")
                self._members = {member.header_offset: member for member in members}
        except (OSError, zipfile.BadZipFile) as error:
            raise_if_system(error, self.path)
            raise InputError(f"{self.path}: truncated or damaged: {error}") from None
        return self._archive


class CombinedSource:
    """Several sources as one: names are ``PART/NAME`` and places ``PART/PLACE``."""

    kind = "archives"

    def __init__(self, parts: Mapping[str, Source]) -> None:
        self.parts, self.path = dict(parts), next(iter(parts.values())).path

    def files(self, keep: Keep) -> Files:
        files = Files()
        for part, source in self.parts.items():
            found = source.files(keep)
            for entry in found:
                place = os.fsencode(part) + b"/" + entry.place
                files.add(f"{part}/{entry.name}", entry.size, place, entry.modified)
            files.rejects += [
                Reject("", f"{part}/{reject.source}", reject.reason) for reject in found.rejects
            ]
            files.skipped += found.skipped
            files.sort()
        return files

    def name(self, place: bytes) -> str:
        part, _, inner = place.partition(b"/")
        return f"{os.fsdecode(part)}/{self.parts[os.fsdecode(part)].name(inner)}"

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        part, _, inner = place.partition(b"/")
        return self.parts[os.fsdecode(part)].read(inner, size, newest)


def _is(kind: Callable[[], bool]) -> bool:
    """Return what is_dir or is_file of a folder's child does; a link to itself is neither."""
    try:
        return kind()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def unsafe_name(name: str) -> str:
    """Return why a member of an archive must not have this name; empty when it may."""
    if "\0" in name:
        return "its name holds a NUL"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name leads out of the archive"
    return ""


def raise_if_system(error: Exception, path: Path) -> None:
    """Raise WorkError for a fault of the system, which is no reason to reject a file for good."""
    if isinstance(error, OSError) and error.errno in SYSTEM_FAULTS:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None


def modified_ns(path: Path) -> int:
    """Return a file's modification time in nanoseconds; WorkError when the file is gone."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise WorkError(f"{path}: gone since the preparation began: {error.strerror}") from None
