"""Read tar archives: plain ones in place, compressed ones from a decompressed copy.

A copy is needed because a position in a compressed stream can only be reached by decompressing
everything before it.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.sources import Files, Folder, Keep, Source, Zip, modified_ns, unsafe_name
from r2id.data.manifest import Reject
from r2id.errors import InputError, WorkError
from r2id.files import atomic_file
from r2id.progress import say

_BLOCK = 512  # bytes: the unit of the tar format
_CHUNK = 1 << 20  # bytes
_NAME = 16  # hexadecimal digits in the name of a decompressed copy
# Limits against decompression bombs: any archive may expand to 1 GiB, larger ones to 200 times
# their size. Archives of images shrink by compression to a half or so at most.
_EXPANSION, _EXPANSION_FREE = 200, 1 << 30
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # first bytes, also of empty or split ones
_DECOMPRESSORS: dict[bytes, Callable[[BinaryIO], Any]] = {  # by an archive's first bytes
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}


def open_source(path: Path, unpacked: Path) -> Source:
    """Open a folder, a zip or a tar; a compressed tar is first decompressed into ``unpacked``."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise InputError(f"source {path}: no such file or folder")
    with _opened(path) as file:
        zipped = file.read(4) in _ZIPS
    return Zip(path) if zipped else Tar(decompressed_tar(path, unpacked))


class Tar:
    """A plain tar, or a tar of tars (``nested``).

    A place is ``OFFSET:NAME`` with the offset of the member's first header, or for a hard link
    ``OFFSET>OFFSET:NAME`` with that of the member that it is a link to, too. A member of an inner
    tar is named ``INNER/MEMBER``, where ``INNER`` is the inner tar's name without ``.tar``.
    """

    kind = "a tar"

    def __init__(self, path: Path, nested: bool = False) -> None:
        self.path, self.nested = path, nested
        self._file: BinaryIO | None = None

    def files(self, keep: Keep) -> Files:
        files, modified = Files(), modified_ns(self.path)
        links: dict[int, str] = {}  # the name of each hard link, by its offset
        with _opened(self.path) as file:
            for member, offset, name in _members(file, self.path, self.nested):
                if not keep(name):
                    files.skip(name)
                elif member.islnk() and not unsafe_name(name):
                    links[offset] = name
                elif reason := _unsafe(member, name):
                    files.rejects.append(Reject("", name, reason))
                else:
                    place = b"%d:" % offset + os.fsencode(name)
                    files.add(name, member.size, place, modified)
            targets = _targets(file, self.path, self.nested, links) if links else {}
        for offset, name in links.items():
            if offset in targets:
                target, size = targets[offset]
                place = b"%d>%d:" % (offset, target) + os.fsencode(name)
                files.add(name, size, place, modified)
            else:
                files.rejects.append(Reject("", name, "a link to nothing in the archive"))
        files.sort()
        return files

    def name(self, place: bytes) -> str:
        return os.fsdecode(place.partition(b":")[2])

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        """See Source.read. The header at the place must still have this name and length."""
        changed = modified_ns(self.path) > newest
        file = self._file = self._file or _opened(self.path)
        offset, _, target = place.partition(b":")[0].partition(b">")
        name = self.name(place)
        member = self._header(file, int(offset))
        same = member is not None and _ends_with(name, member.name)
        if target:
            member = self._header(file, int(target))
            same = same and member is not None and member.isreg()
        start = int(target or offset)
        data = os.pread(file.fileno(), size, start + member.offset_data) if member else b""
        if changed or not same or member is None or not member.size == size == len(data):
            raise WorkError(f"{self.path}: changed since the preparation began ({name})")
        return data

    def close(self) -> None:
        """Close the file, which the next read opens again."""
        self._file = None  # a read in another thread still holds it, and is the last to let go

    @staticmethod
    def _header(file: BinaryIO, start: int) -> tarfile.TarInfo | None:
        """Return the member whose first header is at an offset; None when there is none."""
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=_Part(file, start, size - start), mode="r:") as archive:  # type: ignore[call-overload]
                return archive.next()
        except (tarfile.TarError, EOFError, ValueError):
            return None


def decompressed_tar(path: Path, unpacked: Path) -> Path:
    """Return a plain tar: the file itself, or its decompressed copy in the folder ``unpacked``."""
    with _opened(path) as file:
        start = file.read(8)
        file.seek(0)
        opener = next(
            (opener for magic, opener in _DECOMPRESSORS.items() if start.startswith(magic)), None
        )
        if opener is None:
            return path
        # Size and time are part of the name, so that a changed archive does not find an old copy.
        facts = os.fstat(file.fileno())
        identity = f"{path.absolute()} {facts.st_size} {facts.st_mtime_ns}"
        plain = unpacked / f"{hashlib.sha256(os.fsencode(identity)).hexdigest()[:_NAME]}.tar"
        if not plain.is_file():
            say(f"{path}: decompressing")
            limit = max(_EXPANSION_FREE, _EXPANSION * facts.st_size)
            try:
                with opener(file) as content, atomic_file(plain) as copy:
                    _copy(content, copy, path, limit)
                    # The copy takes the archive's time: it is no change of the source.
                    copy.flush()
                    os.utime(copy.fileno(), ns=(facts.st_atime_ns, facts.st_mtime_ns))
            except (EOFError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path}: truncated or damaged: {error}") from None
        return plain


def remove_decompressed(unpacked: Path) -> None:
    """Remove the copies that decompressed_tar made."""
    for plain in unpacked.glob(f"{'[0-9a-f]' * _NAME}.tar"):
        plain.unlink()
    if unpacked.is_dir() and not any(unpacked.iterdir()):
        unpacked.rmdir()


def _copy(content: BinaryIO, copy: BinaryIO, path: Path, limit: int) -> None:
    """Copy decompressed content; InputError when the archive is damaged or expands too much."""
    copied = 0
    while True:
        try:
            data = content.read(_CHUNK)
        except OSError as error:  # gzip's bad checksums are OSErrors
            raise InputError(f"{path}: truncated or damaged: {error}") from None
        if not data:
            return
        copied += len(data)
        if copied > limit:
            raise InputError(
                f"{path}: expands to more than {limit} bytes, {_EXPANSION} times its size: no "
                "archive of images does: if this one is sound, decompress it and give the tar"
            )
        copy.write(data)


def _targets(
    file: BinaryIO, path: Path, nested: bool, links: dict[int, str]
) -> dict[int, tuple[int, int]]:
    """Return what hard links are links to: offset of the link → offset and size of the file.

    A link refers to the last file of that name before it, which may be a link itself. This takes
    two more passes, so that it takes memory for links alone.
    """
    wanted = {
        _linked(member, name) for member, _, name in _members(file, path, nested) if member.islnk()
    }
    latest: dict[str, tuple[int, int]] = {}
    targets = {}
    for member, offset, name in _members(file, path, nested):
        found = (offset, member.size) if member.isreg() else None
        if member.islnk():
            found = latest.get(_linked(member, name))
            if found and offset in links:
                targets[offset] = found
        if found and name in wanted:
            latest[name] = found
    return targets


def _linked(member: tarfile.TarInfo, name: str) -> str:
    """Return the name, as _members gives names, of the file that a hard link is a link to."""
    inner = name.removesuffix(_plain(member.name))  # the inner tar that it is in, if any
    return inner + _plain(member.linkname)


def _ends_with(name: str, last: str) -> bool:
    return f"/{name}".endswith(f"/{_plain(last)}")


def _plain(name: str) -> str:
    return name.removeprefix("./")


def _members(
    file: BinaryIO, path: Path, nested: bool
) -> Iterator[tuple[tarfile.TarInfo, int, str]]:
    """Yield (member, offset of its first header, name) of a tar, or of the tars in it.

    Raises InputError when an archive is truncated or damaged.
    """
    for member in _walk(file, path, 0, os.fstat(file.fileno()).st_size):
        name = _plain(member.name)
        if not nested:
            yield member, member.offset, name
        elif member.isreg():
            outer = name.removesuffix(".tar")
            for inner in _walk(file, path / name, member.offset_data, member.size):
                yield (inner, member.offset_data + inner.offset, f"{outer}/{_plain(inner.name)}")


def _walk(file: BinaryIO, path: Path, start: int, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield all members except folders of the tar in ``size`` bytes of a file from ``start``."""
    part = _Part(file, start, size)
    try:
        with tarfile.open(fileobj=part, mode="r:") as archive:  # type: ignore[call-overload]
            for member in archive:
                archive.members = []  # tarfile would keep all of them in memory
                if not member.isdir():
                    yield member
            part.seek(archive.offset)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise InputError(
            f"{path}: no tar archive, or a truncated or damaged one: {error}"
        ) from None
    # tarfile takes a damaged header, or a cut between two members, for the end of the archive. The
    # real end is a block of zeros.
    if part.read(_BLOCK) not in (bytes(_BLOCK), b"") or archive.offset + _BLOCK > size:
        raise InputError(f"{path}: truncated or damaged at byte {archive.offset}")


class _Part:
    """A part of a file that can be read like a file of its own."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.position = file, start, size, 0

    def read(self, count: int = -1) -> bytes:
        left = max(0, self.size - self.position)
        data = os.pread(
            self.file.fileno(), left if count < 0 else min(count, left), self.start + self.position
        )
        self.position += len(data)
        return data

    def seek(self, position: int, whence: int = 0) -> int:
        self.position = position + (0, self.position, self.size)[whence]
        return self.position

    def tell(self) -> int:
        return self.position


def _unsafe(member: tarfile.TarInfo, name: str) -> str:
    """Return why a member must not be read; empty when it may."""
    if member.issym():
        return "a link"
    return unsafe_name(name) or ("" if member.isreg() else "no regular file")


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
