"""An existing webdataset: tars whose members are grouped into samples by name, up to the first dot after the last slash."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from webdataset.tariterators import base_plus_ext

from data_prep.base import TEST_SHARE, Item, Items, Listing, stratified_test
from data_prep.files import image_record
from data_prep.folder import SPLITS
from data_prep.sources import IMAGE_SUFFIXES, Entry, Files, Tars, plain_tar
from r2id.data.records import Record
from r2id.data.shards import MANIFEST, Reject
from r2id.errors import InputError

_TARS = (".tar", ".tar.gz", ".tgz")
_KEPT = {"cls", "json", "txt"}


class WebdatasetReader:
    """Classes come from ``.cls`` members (whole numbers), captions from ``.txt``, the rest from ``.json``.

    Splits are sub-folders called train, val or test, or words of the tars' names (``imagenet-train-000.tar``); where there
    are none, a tenth is set aside for testing.
    """

    def __init__(self, source: Path | None, unpacked: Path, max_pixels: int) -> None:
        if source is None:
            raise InputError("source: missing: dataset 'webdataset' needs a tar or a folder of tars")
        if not source.exists():
            raise InputError(f"source {source}: no such file or folder")
        found = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.name.endswith(_TARS))
        if not found:
            raise InputError(f"source {source}: holds no tars ({', '.join(_TARS)})")
        self.source, self.max_pixels = source, max_pixels
        self.splits = [_split_of(path.relative_to(source) if source.is_dir() else Path(path.name)) for path in found]
        self.tars = Tars([plain_tar(path, unpacked) for path in found])

    def listing(self) -> Listing:
        files = self.tars.files(_is_member)
        samples = _group(files)
        rejects, kept = list(files.rejects), []
        for (number, key), members in samples.items():
            images = [ext for ext in members if ext not in _KEPT]
            if len(images) == 1:
                kept.append((number, members, images[0]))
            else:
                words = f"{len(images)} images ({', '.join(images)})" if images else "no image"
                rejects.append(Reject(self.splits[number] or "", key, f"a sample with {words}"))
        if not kept:
            raise InputError(f"source {self.source}: its tars hold no samples with an image")
        labels = [self._label(members, files.newest) for _, members, _ in kept]
        test = stratified_test(labels, TEST_SHARE)
        items = Items()
        for position, (number, members, image) in enumerate(kept):
            split = self.splits[number] or ("test" if test[position] else "train")
            order = [image, *sorted(set(members) - {image})]
            place = json.dumps([[ext, members[ext].place.decode(errors="surrogateescape"), members[ext].size]
                                for ext in order]).encode()
            items.add(split, labels[position], place, members[image].size + 6 * sum(members[ext].size for ext in order[1:]))
        words = f"a webdataset of {len(self.tars.paths)} tars" + (f", {files.words()}" if files.others else "")
        return Listing(items.table(), files.digest, files.newest, self._class_names(labels), rejects=rejects, found=words)

    def records(self, items: Sequence[Item], rejects: list[Reject], newest: int) -> Iterator[Record]:
        for item in items:
            members = {ext: (place.encode(errors="surrogateescape"), size) for ext, place, size in json.loads(item.place)}
            image = next(iter(members))
            name = members[image][0].split(b":", 2)[2].decode(errors="surrogateescape")
            try:
                meta = self._meta({ext: self.tars.read(place, size, newest) for ext, (place, size) in members.items()
                                   if ext in ("json", "txt")})
                place, size = members[image]
                data = self.tars.read(place, size, newest)
                yield image_record(item, data, self.max_pixels, {**meta, "source": name})
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def _label(self, members: dict[str, Entry], newest: int) -> int | None:
        if "cls" not in members:
            return None
        data = self.tars.read(members["cls"].place, members["cls"].size, newest)
        if not re.fullmatch(rb"\s*\d{1,9}\s*", data):
            raise InputError(f"{self.source}: {members['cls'].name}: {data[:20]!r}: must be a class number, 0 or more")
        return int(data)

    def _class_names(self, labels: Sequence[int | None]) -> list[str]:
        """Those of one of our own sets, or numbers."""
        count = 1 + max((label for label in labels if label is not None), default=-1)
        manifest = self.source / MANIFEST
        names = json.loads(manifest.read_bytes()).get("class_names", []) if manifest.is_file() else []
        return names if len(names) >= count else [str(number) for number in range(count)]

    @staticmethod
    def _meta(members: dict[str, bytes]) -> dict[str, Any]:
        meta: dict[str, Any] = {}
        if "json" in members:
            content = json.loads(members["json"])
            meta |= content if isinstance(content, dict) else {"json": content}
        if "txt" in members:
            meta["caption"] = members["txt"].decode()
        return meta


def _group(files: Files) -> dict[tuple[int, str], dict[str, Entry]]:
    """(number of the tar, key) → member by extension, in lower case."""
    samples: dict[tuple[int, str], dict[str, Entry]] = {}
    for entry in files.entries:
        key, extension = base_plus_ext(entry.name)
        samples.setdefault((int(entry.place.split(b":")[0]), key), {})[extension.lower()] = entry
    return samples


def _is_member(name: str) -> bool:
    key, extension = base_plus_ext(name)
    return key is not None and (extension.lower() in _KEPT or f".{extension.lower().split('.')[-1]}" in IMAGE_SUFFIXES)


def _split_of(path: Path) -> str | None:
    words = [*(part.lower() for part in path.parts[:-1]), *re.split(r"[^a-z]+", path.name.lower())]
    return next((SPLITS[word] for word in words if word in SPLITS), None)


