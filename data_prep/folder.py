"""Read any folder, tar or zip of images.

Images may lie flat or in one folder per class. Either layout may also lie below ``train/``,
``val/`` and ``test/``. Instead of folders, a table may name the class of each image.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from data_prep.file_records import FileRecords
from data_prep.items import (
    TEST_SHARE,
    ItemTableBuilder,
    Listing,
    digest_of,
    number_classes,
    stratified_test,
)
from data_prep.paired_embeddings import PairedImages, is_image_or_embedding, pair_embeddings
from data_prep.sources import IMAGE_SUFFIXES, Entry, Files, Folder, is_hidden
from data_prep.tables import column_of, read_rows
from data_prep.tars import open_source
from r2id.data.manifest import Reject
from r2id.errors import InputError
from r2id.progress import say

_NAMED = 5  # folders without images that are named

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

SplitAndClass = tuple[str | None, str | None]
"""Split and class of an image; None where they are unknown."""


class FolderReader(FileRecords):
    """Reads a folder or archive of images; ``labels`` is the path of a table of their classes.

    If all folders at the top are called train, val or test, those are the splits. Otherwise a tenth
    of each class, or of all images when there are no classes, becomes the test split.
    ``NAME.npy`` beside an image is its text embedding.
    """

    def __init__(
        self, source: Path, unpacked: Path, max_pixels: int, labels: Path | None = None
    ) -> None:
        super().__init__(open_source(source, unpacked), max_pixels)
        self.path, self.labels = source, labels

    def listing(self) -> Listing:
        """List the images, with classes and splits from the folders' names or the table."""
        found = self.source.files(is_image_or_embedding)
        paired = pair_embeddings(
            self.path, found, lambda place, size: self.source.read(place, size, found.newest)
        )
        files = paired.images
        if not files:
            note = f"; {files.note()}" if files.skipped else ""
            raise InputError(
                f"source {self.path}: holds no image files ({', '.join(sorted(IMAGE_SUFFIXES))})"
                f"{note}"
            )
        listing = (
            self._from_table(paired, self.labels) if self.labels else self._from_folders(paired)
        )
        return replace(listing, embedding_shape=paired.shape)

    def _from_folders(self, paired: PairedImages) -> Listing:
        """Make the listing with classes and splits from the folders' names."""
        files = paired.images
        start, nested = find_splits(self.path, files, not isinstance(self.source, Folder))
        assigned = assign_from_folders(files, start, nested)
        self._check_layout(files, assigned)
        if any(label is not None for _, label in assigned):
            self._warn_of_empty_classes(files, start + nested + 1)
        kind = " by ".join(
            filter(
                None,
                [
                    f"{self.source.kind} of images",
                    " and ".join(
                        part
                        for part, name in zip(("split", "class"), assigned[0], strict=True)
                        if name
                    ),
                ],
            )
        )
        return make_listing(
            files, assigned, paired.digest, files.newest, files.rejects, [kind, files.note()]
        )

    def _from_table(self, paired: PairedImages, labels: Path) -> Listing:
        """Make the listing with classes from a table.

        Images that are not in the table are rejected, and so are its rows without an image.
        """
        files, table = paired.images, _labels(labels)
        found = _match([entry.name for entry in files], table, self.path.resolve().name)
        if not found:
            raise InputError(
                f"labels {labels}: names none of the {len(files)} images of {self.path}: it has "
                f"{next(iter(table), 'no rows')!r}, the images {next(iter(files)).name!r}"
            )
        kept, assigned, rejects = [], [], list(files.rejects)
        for entry in files:
            if entry.name in found:
                kept.append(entry)
                assigned.append(table.pop(found[entry.name]))
            else:
                rejects.append(Reject("", entry.name, f"no label in {labels.name}"))
        rejects += [
            Reject(split or "", name, f"in {labels.name}, but there is no such image")
            for name, (split, _) in table.items()
        ]
        digest = digest_of([(paired.digest.encode(), 0), (labels.read_bytes(), 0)])
        return make_listing(
            kept,
            assigned,
            digest,
            files.newest,
            rejects,
            [f"{self.source.kind} of images with the classes of {labels.name}", files.note()],
        )

    def _warn_of_empty_classes(self, files: Files, depth: int) -> None:
        """Name the folders that would be classes, ``depth`` folders deep, if they had images."""
        found = {tuple(_parts(entry.name)[:depth]) for entry in files}
        others = {tuple(_parts(name)[:depth]) for name in files.other_folders}
        empty = sorted(
            name
            for name in ("/".join(parts) for parts in others - found if len(parts) == depth)
            if not is_hidden(name)
        )
        if empty:
            named = ", ".join(map(repr, empty[:_NAMED]))
            more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
            say(f"source {self.path}: no image of a known suffix in {named}{more}")

    def _check_layout(self, entries: Iterable[Entry], assigned: Sequence[SplitAndClass]) -> None:
        """Raise InputError when only some images of a split are in class folders."""
        first: dict[str | None, tuple[str, bool]] = {}
        for entry, (split, label) in zip(entries, assigned, strict=True):
            other, classed = first.setdefault(split, (entry.name, label is not None))
            if classed != (label is not None):
                raise InputError(
                    f"source {self.path}: some images are in class folders and some are not: "
                    f"{other!r}, {entry.name!r}"
                )


def make_listing(
    entries: Iterable[Entry],
    assigned: Sequence[SplitAndClass],
    digest: str,
    newest: int,
    rejects: list[Reject],
    notes: Sequence[str],
    class_names: Sequence[str] = (),
) -> Listing:
    """Make a listing of files with known splits and classes.

    Without ``class_names``, the classes are those that occur. Images without a split are divided
    into train and test.
    """
    names = list(class_names) or number_classes(name for _, name in assigned if name is not None)
    odd = next((name for name in names if not _is_text(name)), None)
    if odd is not None:
        raise InputError(f"class {os.fsencode(odd)!r}: the name is not UTF-8: rename the folder")
    numbers = {name: number for number, name in enumerate(names)}
    labels = [None if name is None else numbers[name] for _, name in assigned]
    divided = any(split is None for split, _ in assigned)
    test = stratified_test(labels if divided else [], TEST_SHARE)
    items = ItemTableBuilder()
    for position, entry in enumerate(entries):
        split = assigned[position][0] or ("test" if test[position] else "train")
        items.add(split, labels[position], entry.place, entry.size)
    return Listing(items.table(), digest, newest, names, rejects=rejects, notes=notes)


def assign_from_folders(files: Files, start: int, nested: bool) -> list[SplitAndClass]:
    """Return the split and class of each file, from its folders' names; see ``find_splits``."""
    # Many images share few pairs: one copy of each saves memory.
    shared: dict[SplitAndClass, SplitAndClass] = {}
    assigned = []
    for entry in files:
        parts = _parts(entry.name)
        inner = parts[start + nested :]
        pair = (
            SPLITS[parts[start].lower()] if nested else None,
            inner[0] if len(inner) > 1 else None,
        )
        assigned.append(shared.setdefault(pair, pair))
    return assigned


def find_splits(path: Path, files: Files, archive: bool) -> tuple[int, bool]:
    """Return how many folders at the top to ignore, and whether the next ones are the splits.

    An archive often has one folder at the top that holds everything. If that folder holds folders
    itself, its name is ignored. Raises InputError when some folders at the top are splits and
    others are not.
    """
    tops, shallowest = set(), 3
    for entry in files:
        parts = _parts(entry.name)
        tops.add(parts[0])
        shallowest = min(shallowest, len(parts))
    start = int(
        archive and len(tops) == 1 and shallowest > 2 and next(iter(tops)).lower() not in SPLITS
    )
    nested = all(
        len(parts) > start + 1 and parts[start].lower() in SPLITS
        for parts in (_parts(entry.name) for entry in files)
    )
    if not nested:
        _check_no_splits(path, files, start)
    return start, nested


def _check_no_splits(path: Path, files: Files, start: int) -> None:
    """Raise InputError when a folder at the top is a split: it would be taken for a class.

    A class may be called train, too: then its images lie in its folder itself.
    """
    tops: dict[str, bool] = {}  # whether a folder's images lie in folders within it
    for parts in (_parts(entry.name) for entry in files):
        if len(parts) > start + 1:
            tops[parts[start]] = tops.get(parts[start], False) or len(parts) > start + 2
    split = next((top for top, deep in tops.items() if deep and top.lower() in SPLITS), None)
    other = next((top for top in tops if top.lower() not in SPLITS), None)
    if split is not None and other is not None:
        raise InputError(
            f"source {path}: folder {other!r} lies beside {split!r}, but is neither train, val "
            "nor test: move or rename it, or name classes and splits in a table (--labels)"
        )


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _match(images: Collection[str], rows: Collection[str], folder: str) -> dict[str, str]:
    """Find the row of each image in a table; return the rows' paths by the images'.

    The same path goes first. Tables may also differ in details, leave the suffix out, or begin with
    the name of the source's folder, where only one row and one image are left that fit so.
    """
    found = {name: name for name in set(images).intersection(rows)}

    def without_folder(row: str) -> str:
        return _without_details(row).removeprefix(f"{_without_details(folder)}/")

    def without_suffix(image: str) -> str:
        return _without_details(image.rpartition(".")[0])

    for of_row, of_image in (
        (_without_details, _without_details),
        (without_folder, _without_details),
        (_without_details, without_suffix),
        (without_folder, without_suffix),
    ):
        taken = set(found.values())
        by_form = _unique(of_row, [row for row in rows if row not in taken])
        images = [image for image in images if image not in found]
        for form, image in _unique(of_image, images).items():
            if form in by_form:
                found[image] = by_form[form]
    return found


def _unique(form: Callable[[str], str], names: Collection[str]) -> dict[str, str]:
    """Return the names by their forms, without forms that several names have."""
    pairs = [(form(name), name) for name in names]
    counts = Counter(key for key, _ in pairs)
    return {key: name for key, name in pairs if counts[key] == 1}


def _without_details(name: str) -> str:
    """Return a path as people see it: without blanks around it, letters and accents in one.

    macOS and some archives keep accents apart from their letters, tables do so rarely.
    """
    return os.path.normpath(unicodedata.normalize("NFC", name.strip()))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _labels(path: Path) -> dict[str, SplitAndClass]:
    """Read a table of labels: split and class by image path; InputError names the faulty line."""
    rows = read_rows(path)
    _, header = next(rows)
    name = column_of(header, ("path", "file", "filename", "file_name", "image", "image_id"), path)
    label = column_of(header, ("label", "class", "target", "category"), path)
    split = next(
        (number for number, column in enumerate(header) if column.strip().lower() == "split"), None
    )
    table: dict[str, SplitAndClass] = {}
    shared: dict[SplitAndClass, SplitAndClass] = {}
    for line, row in rows:
        key = os.path.normpath(row[name])
        part = None if split is None else row[split].strip().lower()
        if part is not None and part not in SPLITS:
            raise InputError(
                f"{path}: line {line}: split {part!r}: must be one of {', '.join(SPLITS)}"
            )
        if not row[label].strip():
            raise InputError(f"{path}: line {line}: no label for {key!r}")
        if key in table:
            raise InputError(f"{path}: line {line}: {key!r} for a second time")
        pair = SPLITS[part] if part else None, row[label].strip()
        table[key] = shared.setdefault(pair, pair)
    return table
