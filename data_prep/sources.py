"""Where image files are: in a folder, in tar archives (also in tars inside a tar) or in a zip. Nothing is ever unpacked
to where an archive's names say: members are read by their place.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from data_prep.base import digest_of
from r2id.data.files import atomic_file
from r2id.data.shards import Reject
from r2id.errors import InputError, WorkError
from r2id.progress import say

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_BLOCK = 512
_COMPRESSED: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file), b"BZh": bz2.BZ2File, b"\xfd7zXZ": lzma.LZMAFile}  # type: ignore


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of a source: its path inside it, its length, and what it is found by."""

    name: str
    size: int
    place: bytes


@dataclass
class Files:
    """What a source was found to hold; entries are sorted by name, byte by byte."""

    entries: list[Entry] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    others: int = 0
    """Files that do not look like images by their names."""
    newest: int = 0

    @property
    def digest(self) -> str:
        return digest_of((os.fsencode(entry.name), entry.size) for entry in self.entries)

    def words(self) -> str:
        return f"{self.others} other files left out" if self.others else ""


class Source(Protocol):
    """``read`` gives a place's bytes: ValueError when they cannot be read, WorkError when they were changed after the
    listing, of which ``newest`` and ``size`` are."""

    path: Path

    def files(self, keep: Callable[[str], bool]) -> Files:
        """Everything whose name is to be kept. InputError when the source cannot be listed."""
        ...

    def read(self, place: bytes, size: int, newest: int) -> bytes: ...


def is_image(name: str) -> bool:
    """By its suffix; hidden files are none (macOS leaves ``._x.jpg`` beside ``x.jpg``)."""
    path = PurePosixPath(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def open_source(path: Path, unpacked: Path) -> Source:
    """A folder, a zip, or a tar, whose compressed form is first laid down plain in the folder ``unpacked``."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise InputError(f"source {path}: no such file or folder")
    if zipfile.is_zipfile(path):
        return Zip(path)
    return Tars([plain_tar(path, unpacked)])


class Folder:
    """Links are followed, each folder is entered once."""

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise InputError(f"source {path}: no such folder")
        self.path = path

    def files(self, keep: Callable[[str], bool]) -> Files:
        files = Files()
        self._walk(self.path, "", files, keep, set())
        files.entries.sort(key=lambda entry: entry.place)
        return files

    def _walk(self, folder: Path, prefix: str, files: Files, keep: Callable[[str], bool],
              seen: set[tuple[int, int]]) -> None:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as found:
                children = sorted(found, key=lambda child: os.fsencode(child.name))
        except OSError as error:
            raise InputError(f"{folder}: cannot be listed: {error.strerror}") from None
        for child in children:
            name = prefix + child.name
            if child.is_dir():
                if not child.name.startswith("."):
                    self._walk(folder / child.name, f"{name}/", files, keep, seen)
            elif not keep(name):
                files.others += 1
            elif child.is_file():
                facts = child.stat()
                files.newest = max(files.newest, facts.st_mtime_ns)
                files.entries.append(Entry(name, facts.st_size, os.fsencode(name)))
            else:
                what = "a link to nothing" if child.is_symlink() else "no regular file"
                files.rejects.append(Reject("", name, what))

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
            raise ValueError(f"cannot be read: {error.strerror}") from None


class Tars:
    """One or several tars, read by offset. Their names are ``MEMBER``; those of nested ones ``OUTER/MEMBER``, without the
    ``.tar`` of the outer member. A place is (number of the tar, offset, name)."""

    def __init__(self, paths: Sequence[Path], nested: bool = False) -> None:
        self.paths, self.nested, self.path = list(paths), nested, paths[0]
        self._open: dict[int, BinaryIO] = {}

    def files(self, keep: Callable[[str], bool]) -> Files:
        files = Files()
        seen: set[tuple[int, str]] = set()
        for number, path in enumerate(self.paths):
            files.newest = max(files.newest, _status(path).st_mtime_ns)
            with _opened(path) as file:
                for member, offset, name in _members(file, path, self.nested):
                    if not keep(name):
                        files.others += 1
                        continue
                    reason = "twice in the archive" if (number, name) in seen else _unsafe(member, name)
                    seen.add((number, name))
                    if reason:
                        files.rejects.append(Reject("", name, reason))
                    else:
                        files.entries.append(Entry(name, member.size, b"%d:%d:" % (number, offset) + os.fsencode(name)))
        files.entries.sort(key=lambda entry: (entry.place.split(b":")[0], os.fsencode(entry.name)))
        return files

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        number, offset, name = place.split(b":", 2)
        return self.read_at(int(number), int(offset), size, newest, os.fsdecode(name))

    def read_at(self, number: int, offset: int, size: int, newest: int, name: str) -> bytes:
        """One member's bytes. Its header, the block before, must still be that of a file of this length."""
        path = self.paths[number]
        if number not in self._open:
            self._open[number] = _opened(path)
        descriptor = self._open[number].fileno()
        block = os.pread(descriptor, _BLOCK + size, offset - _BLOCK)
        try:
            header = tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "surrogateescape")
            same = len(block) == _BLOCK + size and header.size in (size, 0)  # in a PAX archive the size may stand before
        except tarfile.TarError:
            same = False
        if not same or _status(path).st_mtime_ns > newest:
            raise WorkError(f"{path}: changed since the preparation began ({name})")
        return block[_BLOCK:]


class Zip:
    """A place is (0, offset, name), as of a tar: names may be there twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._archive: zipfile.ZipFile | None = None
        self._members: dict[int, zipfile.ZipInfo] = {}

    def files(self, keep: Callable[[str], bool]) -> Files:
        files = Files(newest=_status(self.path).st_mtime_ns)
        seen: set[str] = set()
        for member in self._opened().infolist():
            name = member.filename
            if member.is_dir():
                continue
            if not keep(name):
                files.others += 1
                continue
            kind = stat.S_IFMT(member.external_attr >> 16)
            reason = _unsafe_name(name) or ("twice in the archive" if name in seen else "")
            reason = reason or ("a link" if kind == stat.S_IFLNK else "") or ("encrypted" if member.flag_bits & 1 else "")
            seen.add(name)
            if reason:
                files.rejects.append(Reject("", name, reason))
            else:
                files.entries.append(Entry(name, member.file_size, b"0:%d:" % member.header_offset + os.fsencode(name)))
        files.entries.sort(key=lambda entry: os.fsencode(entry.name))
        return files

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        if _status(self.path).st_mtime_ns > newest:
            raise WorkError(f"{self.path}: changed since the preparation began")
        try:
            archive = self._opened()
            with archive.open(self._members[int(place.split(b":")[1])]) as file:
                data = file.read(size + 1)
        except (OSError, zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, KeyError) as error:
            raise ValueError(f"cannot be read: {error}") from None
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes, not the {size} that the archive states")
        return data

    def _opened(self) -> zipfile.ZipFile:
        try:
            if self._archive is None:
                self._archive = zipfile.ZipFile(self.path)
                self._members = {member.header_offset: member for member in self._archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path}: truncated or damaged: {error}") from None
        return self._archive


def plain_tar(path: Path, unpacked: Path) -> Path:
    """The tar itself, or, of a compressed one, its content in a file of the folder ``unpacked``."""
    with _opened(path) as file:
        start = file.read(8)
        file.seek(0)
        opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
        if opener is None:
            return path
        place = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]  # two of them may have one name
        plain = unpacked / f"{place}-{path.stat().st_size}.tar"
        if not plain.is_file():
            say(f"{path}: decompressing")
            try:
                with opener(file) as content, atomic_file(plain) as copy:
                    _copy(content, copy, path)
            except (EOFError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path}: truncated or damaged: {error}") from None
        return plain


def _copy(content: BinaryIO, copy: BinaryIO, path: Path) -> None:
    """What is wrong with the content is the archive's fault, not the disk's."""
    while True:
        try:
            data = content.read(1 << 20)
        except OSError as error:  # gzip's bad checksums are OSErrors
            raise InputError(f"{path}: truncated or damaged: {error}") from None
        if not data:
            return
        copy.write(data)


def free(unpacked: Path) -> None:
    """Remove what plain_tar laid down."""
    for plain in unpacked.glob("*.tar"):
        plain.unlink()
    if unpacked.is_dir() and not any(unpacked.iterdir()):
        shutil.rmtree(unpacked)


def _members(file: BinaryIO, path: Path, nested: bool) -> Iterator[tuple[tarfile.TarInfo, int, str]]:
    """(member, offset of its content in the file, name). InputError where the archive does not end as it should."""
    for member in _walk_tar(file, path, 0, _status(path).st_size):
        name = member.name.removeprefix("./")
        if not nested:
            yield member, member.offset_data, name
        elif member.isreg():
            outer = name.removesuffix(".tar")
            inner_path = path / name
            for inner in _walk_tar(file, inner_path, member.offset_data, member.size):
                yield inner, member.offset_data + inner.offset_data, f"{outer}/{inner.name.removeprefix('./')}"


def _walk_tar(file: BinaryIO, path: Path, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Every member but folders of the tar that is ``size`` bytes of a file."""
    part = _Part(file, start, size)
    try:
        with tarfile.open(fileobj=part, mode="r:") as archive:  # type: ignore[call-overload]
            for member in archive:
                archive.members = []  # it would keep them all
                if not member.isdir():
                    yield member
            part.seek(archive.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(f"{path}: no tar archive, or a truncated or damaged one: {error}") from None
    # The library takes a damaged header, or a cut between two members, for the end.
    if part.read(_BLOCK) not in (bytes(_BLOCK), b"") or archive.offset + _BLOCK > size:
        raise InputError(f"{path}: truncated or damaged at byte {archive.offset}")


class _Part:
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        data = os.pread(self.file.fileno(), left if count < 0 else min(count, left), self.start + self.position)
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def _unsafe(member: tarfile.TarInfo, name: str) -> str:
    if member.issym() or member.islnk():
        return "a link"
    return "" if member.isreg() and not _unsafe_name(name) else _unsafe_name(name) or "no regular file"


def _unsafe_name(name: str) -> str:
    if "\0" in name:
        return "its name holds a NUL"
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        return "its name leads out of the archive"
    return ""


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise WorkError(f"{path}: gone since the preparation began: {error.strerror}") from None
