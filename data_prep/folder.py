"""Any folder of images: flat, or ``class/…``, either of them also below ``train/``, ``val/`` and ``test/``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.base import TEST_SHARE, Item, stratified_test
from r2id.data.records import Record, as_png, inspect
from r2id.data.shards import Reject
from r2id.errors import InputError, WorkError

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class FolderReader:
    """Images keep their bytes when they are JPEG, PNG or WebP, whatever their names say; others become PNG.

    Where every folder at the top is called train, val or test, those are the splits. Otherwise a tenth of each class,
    or of all images when there are no classes, is set aside as the test split.
    """

    def __init__(self, source: Path | None) -> None:
        if source is None:
            raise InputError("source: missing: dataset 'folder' needs the folder of the images")
        if not source.is_dir():
            raise InputError(f"source {source}: no such folder")
        self.source = source
        self._files = _walk(source)
        if not self._files:
            raise InputError(f"source {source}: holds no image files ({', '.join(sorted(_SUFFIXES))})")
        self._placed = _place([Path(name).parts for name, _ in self._files])
        self._check_layout()
        self.class_names = sorted({name for _, name in self._placed if name is not None})

    @property
    def digest(self) -> str:
        """Of names and lengths: it takes no reading of the images, and does not change when the folder is copied."""
        content = hashlib.sha256()
        for name, size in self._files:
            content.update(os.fsencode(name) + b"\0%d\0" % size)
        return content.hexdigest()

    def items(self) -> list[Item]:
        """In the order of the paths."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = [None if name is None else numbers[name] for _, name in self._placed]
        test = stratified_test(labels, TEST_SHARE)
        items = []
        for position, (name, size) in enumerate(self._files):
            split = self._placed[position][0] or ("test" if test[position] else "train")
            items.append(Item(f"{split}-{position:08d}", split, labels[position], name, size))
        return items

    def records(self, items: Sequence[Item], rejects: list[Reject]) -> Iterator[Record]:
        for item in items:
            try:
                yield self._record(item)
            except ValueError as error:
                rejects.append(Reject(item.split, item.place, str(error)))

    def _record(self, item: Item) -> Record:
        path = self.source / item.place
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise WorkError(f"{path}: gone since the preparation began") from None
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
        if len(data) != item.size:
            raise WorkError(f"{path}: changed since the preparation began")
        facts = inspect(data)
        if facts.ext is None:
            data = as_png(data)
        return Record(item.key, data, facts.ext or "png", facts.height, facts.width, facts.mode, item.label,
                      {"source": item.place})

    def _check_layout(self) -> None:
        """In each split either all images have a class or none."""
        first: dict[str | None, tuple[str, bool]] = {}
        for (name, _), (split, label) in zip(self._files, self._placed, strict=True):
            other, classed = first.setdefault(split, (name, label is not None))
            if classed != (label is not None):
                raise InputError(f"source {self.source}: some images are in class folders and some are not: "
                                 f"{other!r}, {name!r}")


def _walk(source: Path) -> list[tuple[str, int]]:
    """(relative path, bytes) of all image files, sorted. Links are followed, each folder is entered once."""
    found = []
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(source, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(folder, name)
            if path.suffix.lower() in _SUFFIXES and not name.startswith(".") and path.is_file():
                found.append((path.relative_to(source).as_posix(), path.stat().st_size))
    return sorted(found, key=lambda entry: os.fsencode(entry[0]))


def _place(paths: list[tuple[str, ...]]) -> list[tuple[str | None, str | None]]:
    """(split, class) of each path, as far as the folders tell."""
    nested = all(len(parts) > 1 and parts[0].lower() in _SPLITS for parts in paths)
    placed = []
    for parts in paths:
        inner = parts[1:] if nested else parts
        placed.append((_SPLITS[parts[0].lower()] if nested else None, inner[0] if len(inner) > 1 else None))
    return placed
