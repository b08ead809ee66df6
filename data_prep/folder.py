"""Any folder, tar or zip of images: flat, or ``class/…``, either of them also below ``train/``, ``val/`` and ``test/``;
or with the classes in a table."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from data_prep.base import TEST_SHARE, Items, Listing, digest_of, number_classes, stratified_test
from data_prep.files import FileRecords, column_of, read_table
from data_prep.sources import IMAGE_SUFFIXES, Entry, Folder, is_image, open_source
from r2id.data.shards import Reject
from r2id.errors import InputError

SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

Placed = tuple[str | None, str | None]
"""(split, class) of an image, as far as they are known."""


class FolderReader(FileRecords):
    """Where every folder at the top is called train, val or test, those are the splits. Otherwise a tenth of each class,
    or of all images when there are no classes, is set aside as the test split.
    """

    def __init__(self, source: Path | None, unpacked: Path, max_pixels: int, labels: Path | None = None) -> None:
        if source is None:
            raise InputError("source: missing: dataset 'folder' needs the folder or archive of the images")
        super().__init__(open_source(source, unpacked), max_pixels)
        self.path, self.labels = source, labels

    def listing(self) -> Listing:
        files = self.source.files(is_image)
        if not files.entries:
            raise InputError(f"source {self.path}: holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
        digest, rejects = files.digest, list(files.rejects)
        if self.labels:
            entries, placed = self._look_up(files.entries, rejects)
            digest = digest_of([(digest.encode(), 0), (self.labels.read_bytes(), 0)])
        else:
            entries, placed = files.entries, place([PurePosixPath(entry.name).parts for entry in files.entries],
                                                   archive=not isinstance(self.source, Folder))
            self._check_layout(entries, placed)
        return make_listing(entries, placed, digest, files.newest, rejects, files.words())

    def _look_up(self, entries: Sequence[Entry], rejects: list[Reject]) -> tuple[list[Entry], list[Placed]]:
        """The entries that the table names, and what it says of them; the others, and names without images, are rejects."""
        table = _labels(self.labels) if self.labels else {}
        known = {name: table.pop(name) for name in [entry.name for entry in entries] if name in table}
        rejects += [Reject("", entry.name, f"no label in {self.labels}") for entry in entries if entry.name not in known]
        rejects += [Reject("", name, f"in {self.labels}, but there is no such image") for name in table]
        kept = [entry for entry in entries if entry.name in known]
        if not kept:
            raise InputError(f"labels {self.labels}: names none of the {len(entries)} images of {self.path}: paths must be "
                             f"relative to it, like {entries[0].name!r}")
        return kept, [known[entry.name] for entry in kept]

    def _check_layout(self, entries: Sequence[Entry], placed: Sequence[Placed]) -> None:
        """In each split either all images have a class or none."""
        first: dict[str | None, tuple[str, bool]] = {}
        for entry, (split, label) in zip(entries, placed, strict=True):
            other, classed = first.setdefault(split, (entry.name, label is not None))
            if classed != (label is not None):
                raise InputError(f"source {self.path}: some images are in class folders and some are not: "
                                 f"{other!r}, {entry.name!r}")


def make_listing(entries: Sequence[Entry], placed: Sequence[Placed], digest: str, newest: int, rejects: list[Reject],
                 found: str, class_names: Sequence[str] = ()) -> Listing:
    """Classes are those that occur, unless they are given; images without a split are parted into train and test."""
    names = list(class_names) or number_classes(name for _, name in placed if name is not None)
    numbers = {name: number for number, name in enumerate(names)}
    labels = [None if name is None else numbers[name] for _, name in placed]
    test = stratified_test(labels, TEST_SHARE)
    items = Items()
    for position, entry in enumerate(entries):
        split = placed[position][0] or ("test" if test[position] else "train")
        items.add(split, labels[position], entry.place, entry.size)
    return Listing(items.table(), digest, newest, names, rejects=rejects, found=found)


def place(paths: Sequence[tuple[str, ...]], archive: bool = False) -> list[Placed]:
    """(split, class) of each path, as far as the folders tell. An archive's one top folder, which holds folders, is just
    its name."""
    start = 0
    if archive and paths and len({parts[0] for parts in paths}) == 1 and min(map(len, paths)) > 2:
        start = 0 if paths[0][0].lower() in SPLITS else 1
    nested = all(len(parts) > start + 1 and parts[start].lower() in SPLITS for parts in paths)
    placed = []
    for parts in paths:
        inner = parts[start + nested:]
        placed.append((SPLITS[parts[start].lower()] if nested else None, inner[0] if len(inner) > 1 else None))
    return placed


def _labels(path: Path) -> dict[str, Placed]:
    """Image path → (split, class). InputError naming the line of what is wrong."""
    rows = read_table(path)
    name = column_of(rows, ("path", "file", "filename", "file_name", "image", "image_id"), path)
    label = column_of(rows, ("label", "class", "target"), path)
    split = next((column for column in rows[0] if column.strip().lower() == "split"), None)
    table: dict[str, Placed] = {}
    for number, row in enumerate(rows, start=2):
        key = os.path.normpath(row[name].strip())
        value = row[split].strip().lower() if split else None
        if value is not None and value not in SPLITS:
            raise InputError(f"{path}: line {number}: split {row[split or '']!r}: must be one of {', '.join(SPLITS)}")
        if not row[label].strip():
            raise InputError(f"{path}: line {number}: no label for {key!r}")
        if key in table:
            raise InputError(f"{path}: line {number}: {key!r} for a second time")
        table[key] = SPLITS[value] if value else None, row[label].strip()
    return table
