"""Read an existing webdataset: tars whose members are grouped into samples by their names.

A sample's key is the name up to the first dot after the last slash; the rest is the extension.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from webdataset.tariterators import base_plus_ext

from data_prep.class_members import ClassMembers
from data_prep.file_records import check_length, embedding_of, image_record
from data_prep.folder import SPLITS
from data_prep.items import (
    TEST_SHARE,
    Item,
    ItemTableBuilder,
    Listing,
    TableBuilder,
    check_class_number,
    digest_of,
    iter_rows,
    number_occurring,
    stratified_test,
)
from data_prep.paired_embeddings import NO_EMBEDDING, common_shape
from data_prep.sources import (
    IMAGE_SUFFIXES,
    Entry,
    Folder,
    describe_skipped,
    is_hidden,
    modified_ns,
)
from data_prep.tars import Tar, decompressed_tar
from r2id.data.manifest import MANIFEST, PLAN, Manifest, Reject, read_manifest
from r2id.data.records import Record
from r2id.errors import InputError

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2")
_KEPT = ("cls", "json", "txt", "npy")
_OPEN_FILES = 256  # tars, well below the usual limit of 1024
_SAMPLES = pa.schema(
    [
        ("tar", pa.int32()),
        ("label", pa.int32()),
        ("place", pa.binary()),
        ("size", pa.int64()),
        ("embedding", pa.int64()),
    ]
)
"""``embedding`` is the length of a sample's embedding file; null if it has none."""

Member = tuple[str, str, int]
"""Extension as written in the tar, place in the tar without the name, and length."""


class WebdatasetReader:
    """Reads a tar, or a folder of tars.

    Classes come from ``.cls`` members (whole numbers, or names), captions from ``.txt``, text
    embeddings from ``.npy`` and other annotations from ``.json``. Splits are subfolders called
    train, val or test, or words in the tars' names (``imagenet-train-000.tar``). Without either, a
    tenth becomes the test split. A place is JSON: [number of the tar, key, the image's member,
    other members, …].
    """

    def __init__(self, source: Path, unpacked: Path, max_pixels: int) -> None:
        found = [source] if source.is_file() else _find_tars(source, unpacked.parent)
        if not found:
            raise InputError(f"source {source}: holds no tars ({', '.join(_TARS)})")
        self.source, self.max_pixels, self.own = source, max_pixels, _own_manifest(source)
        self.splits = [
            _split_of(path.relative_to(source) if source.is_dir() else Path(path.name))
            for path in found
        ]
        self.tars = [Tar(decompressed_tar(path, unpacked)) for path in found]
        self._open: dict[int, None] = {}  # numbers of tars, in the order in which they were opened
        self._opening = Lock()  # a Dask worker reads in several threads

    def listing(self) -> Listing:
        """List the samples. Class numbers are read, images and annotations are not."""
        samples, rejects, digests = TableBuilder(_SAMPLES), list[Reject](), list[str]()
        classes = ClassMembers()
        newest = max(modified_ns(tar.path) for tar in self.tars)
        extensions: set[str] = set()
        skipped = Counter[str]()
        for number, tar in enumerate(self.tars):
            files = tar.files(_is_member)
            digests.append(files.digest)
            skipped += files.skipped
            rejects += [
                Reject(self.splits[number] or "", reject.source, reject.reason)
                for reject in files.rejects
            ]
            for key, members in _group(files):
                reason = self._add(samples, classes, number, key, members, newest)
                if reason:
                    rejects.append(Reject(self.splits[number] or "", key, reason))
                else:
                    extensions |= members.keys()
        if not len(samples):
            why = f": {rejects[0].source}: {rejects[0].reason}" if rejects else ""
            raise InputError(f"source {self.source}: its tars hold no usable samples{why}")
        table, class_names = classes.in_order(samples.table())
        self._check_labels(table)
        digest = digest_of(
            [
                *((digest.encode(), 0) for digest in digests),
                (repr(table["label"].to_pylist()).encode(), 0),
                *((name.encode(), 0) for name in class_names),
            ]
        )
        table, shape = self._with_embeddings(table, rejects, newest)
        names = self.own.class_names if self.own else class_names
        note = ""
        if len(names) <= (pc.max(table["label"]).as_py() or 0):
            table, names, note = number_occurring(table)
        attributes = self.own.attribute_names if self.own else []
        found = [
            f"a webdataset of {len(self.tars)} tars with {', '.join(sorted(extensions))}",
            describe_skipped(skipped),
            note,
        ]
        return Listing(self._items(table), digest, newest, names, attributes, rejects, found, shape)

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """See data_prep.items.Reader."""
        for item in items:
            number, key, *members = json.loads(item.place)
            name = f"{key}.{members[0][0]}"
            try:
                check_length(members[0][2], self.max_pixels)
                data, *others = (self._read(number, key, member, newest) for member in members)
                contents = {
                    member[0].lower(): content
                    for member, content in zip(members[1:], others, strict=True)
                }
                meta = _meta(contents)
                embedding = (
                    embedding_of(contents["npy"], embedding_shape) if embedding_shape else None
                )
                yield image_record(
                    item,
                    data,
                    self.max_pixels,
                    {"source": name, **meta},
                    self._attributes(meta),
                    embedding,
                )
            except InputError:  # a fault of the whole source, not of one image
                raise
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def _add(
        self,
        samples: TableBuilder,
        classes: ClassMembers,
        number: int,
        key: str,
        members: dict[str, Member],
        newest: int,
    ) -> str:
        """Add a sample and return "", or return why it cannot be used."""
        images = [extension for extension in members if extension not in _KEPT]
        # There may be other images beside the main one, such as masks called KEY.seg.png.
        plain = [extension for extension in images if "." not in extension]
        if len(plain or images) != 1:
            return (
                f"a sample with {len(images)} images ({', '.join(images)})"
                if images
                else "a sample with no image"
            )
        label = None
        if "cls" in members:
            content = self._read(number, key, members["cls"], newest)
            label = classes.number(content, f"{self.tars[number].path}: {key}.cls")
        image, others = (
            members[(plain or images)[0]],
            [members[kind] for kind in ("json", "txt") if kind in members],
        )
        # JSON takes up to six bytes for a character that it escapes.
        size = image[2] + 6 * sum(other[2] for other in others)
        embedding = [members["npy"]] if "npy" in members else []
        samples.append(
            number,
            label,
            json.dumps([number, key, image, *others, *embedding]).encode(),
            size,
            embedding[0][2] if embedding else None,
        )
        return ""

    def _with_embeddings(
        self, samples: pa.Table, rejects: list[Reject], newest: int
    ) -> tuple[pa.Table, list[int]]:
        """Return the samples to keep and the shape of their embeddings.

        If any sample has an embedding, those without one are rejected.
        """

        def read(place: bytes, _size: int) -> bytes:
            number, key, *members = json.loads(place)
            return self._read(number, key, members[-1], newest)

        has_embedding = samples["embedding"].is_valid()
        if not pc.any(has_embedding).as_py():
            return samples, []
        for place in samples.filter(pc.invert(has_embedding))["place"].to_pylist():
            number, key, image, *_ = json.loads(place)
            rejects.append(Reject(self.splits[number] or "", f"{key}.{image[0]}", NO_EMBEDDING))
        kept = samples.filter(has_embedding)
        return kept, common_shape(self.source, kept["embedding"], kept["place"], read)

    def _read(self, number: int, key: str, member: Member, newest: int) -> bytes:
        extension, offset, size = member
        with self._opening:
            if number not in self._open and len(self._open) >= _OPEN_FILES:
                first = next(iter(self._open))
                del self._open[first]
                self.tars[first].close()
            self._open[number] = None
        return self.tars[number].read(
            f"{offset}:{key}.{extension}".encode(errors="surrogateescape"), size, newest
        )

    def _items(self, samples: pa.Table) -> pa.Table:
        labels = samples["label"].to_pylist()
        test = stratified_test(labels if None in self.splits else [], TEST_SHARE)
        items = ItemTableBuilder()
        for position, (number, label, place, size, _) in enumerate(iter_rows(samples)):
            items.add(
                self.splits[number] or ("test" if test[position] else "train"), label, place, size
            )
        return items.table()

    def _check_labels(self, samples: pa.Table) -> None:
        """Raise InputError when the highest class number cannot be one."""
        highest = pc.max(samples["label"]).as_py()
        if highest is not None:
            row = pc.index(samples["label"], pa.scalar(highest, pa.int32())).as_py()
            number, key, *_ = json.loads(samples["place"][row].as_py())
            check_class_number(highest, len(samples), f"{self.tars[number].path}: {key}.cls")

    def _attributes(self, meta: dict[str, Any]) -> tuple[int, ...] | None:
        if not (self.own and self.own.attribute_names):
            return None
        values = meta.get("attributes")
        count = len(self.own.attribute_names)
        if (
            not isinstance(values, list)
            or len(values) != count
            or any(value not in (-1, 1) for value in values)
        ):
            raise ValueError(f"its JSON has no {count} attributes of -1 or 1")
        return tuple(values)


def _find_tars(folder: Path, out: Path) -> list[Path]:
    """Return the tars in a folder and its subfolders, sorted; ``out`` has those of the new set."""
    own = os.path.relpath(out.resolve(), folder.resolve()) + "/"  # out may lie in the folder
    files = Folder(folder).files(
        lambda name: (
            name.endswith(_TARS)
            and not PurePosixPath(name).name.startswith(".")
            and not name.startswith(own)
        )
    )
    if files.rejects:
        raise InputError(f"{folder / files.rejects[0].source}: {files.rejects[0].reason}")
    return [folder / entry.name for entry in files]


def _own_manifest(source: Path) -> Manifest | None:
    """Read the manifest if r2id wrote the set. Other programs use this file name too."""
    path = source / MANIFEST
    own = (source / PLAN).is_file() or (path.is_file() and b'"format_version"' in path.read_bytes())
    return read_manifest(source) if own else None


def _meta(members: dict[str, bytes]) -> dict[str, Any]:
    """Parse a sample's annotations: the JSON's fields, and the text as its "caption"."""
    meta: dict[str, Any] = {}
    if "json" in members:
        try:
            content = json.loads(members["json"])
        except RecursionError:
            raise ValueError("its JSON is nested too deeply") from None
        except ValueError as error:
            raise ValueError(f"its JSON: {error}") from None
        meta |= content if isinstance(content, dict) else {"json": content}
    if "txt" in members:
        try:
            meta["caption"] = members["txt"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"its text: {error}") from None
    return meta


def _group(files: Iterable[Entry]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Group members into samples; yield (key, members by extension in lower case).

    An extension begins at the first dot, so that 1.5.png and 1.5.cls are members 5.png and 5.cls of
    sample 1. Where all members have one such beginning, it is part of the key: they are png and cls
    of sample 1.5.
    """
    samples: dict[str, list[Member]] = {}
    for entry in files:
        key, extension = base_plus_ext(entry.name)
        place = entry.place.partition(b":")[0].decode()
        samples.setdefault(key, []).append((extension, place, entry.size))
    for key, members in samples.items():
        begin, *others = {extension.rpartition(".")[0] for extension, _, _ in members}
        if begin and not others:
            key = f"{key}.{begin}"
            members = [(name.rpartition(".")[2], place, size) for name, place, size in members]
        kept = {member[0].lower(): member for member in members if _is_known(member[0])}
        if kept:
            yield key, kept


def _is_member(name: str) -> bool:
    key, extension = base_plus_ext(name)
    return key is not None and not is_hidden(name) and _is_known(extension.rpartition(".")[2])


def _is_known(extension: str) -> bool:
    """Whether it is that of an annotation, or ends like that of an image: png or seg.png."""
    extension = extension.lower()
    return extension in _KEPT or f".{extension.rpartition('.')[2]}" in IMAGE_SUFFIXES


def _split_of(path: Path) -> str | None:
    """Return the split that a folder, or a word in the name, of a tar stands for; None if none."""
    words = [*(part.lower() for part in path.parts[:-1]), *re.split(r"[^a-z]+", path.name.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)
