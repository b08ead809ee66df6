"""ImageNet-1k (Russakovsky et al., "ImageNet large scale visual recognition challenge", IJCV 2015) in the four shapes in
which it is handed on:

* as published: ``ILSVRC2012_img_train.tar``, a tar of a tar per class, ``ILSVRC2012_img_val.tar``, and the development kit
  with the labels of the validation images; read in place, never unpacked;
* Kaggle's: ``ILSVRC/Data/CLS-LOC/{train/<wnid>,val,test}`` with ``LOC_val_solution.csv`` and ``LOC_synset_mapping.txt``;
* Hugging Face's: Parquet files ``{train,validation,test}-00000-of-00294.parquet``, in ``data/`` or not;
* folders ``<wnid>/``, or ``train/<wnid>/`` and ``val/<wnid>/``.

Classes are WordNet ids in sorted order, 0 to 999, which is not the order of the development kit.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.base import Item, Items, Listing, Reader, digest_of
from data_prep.files import FileRecords, column_of, first_existing, image_record, read_table
from data_prep.folder import SPLITS, Placed, make_listing
from data_prep.sources import Entry, Folder, Tars, is_image, plain_tar
from r2id.data.records import Record
from r2id.data.shards import Reject
from r2id.errors import InputError, WorkError

_TARS = {"train": ("ILSVRC2012_img_train.tar",), "val": ("ILSVRC2012_img_val.tar",),
         "test": ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar")}
_KIT = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_WNID = re.compile(r"n\d{8}")
_PARQUET = re.compile(r"(train|validation|val|test)-\d+-of-\d+.*\.parquet")


def open_imagenet(source: Path | None, unpacked: Path, max_pixels: int) -> Reader:
    """The reader of the shape that the source has. InputError when it has none of them."""
    if source is None:
        raise InputError("source: missing: dataset 'imagenet' needs the folder of its files")
    if not source.is_dir():
        raise InputError(f"source {source}: no such folder")
    if any((source / name).is_file() for names in _TARS.values() for name in names):
        return TarImagenet(source, unpacked, max_pixels)
    kaggle = first_existing(source, ("", "ILSVRC"), ("Data/CLS-LOC",))
    if kaggle:
        return FolderImagenet(source, kaggle, max_pixels)
    parquet = next((folder for folder in (source / "data", source) if _parquet_files(folder)), None)
    if parquet:
        return ParquetImagenet(parquet, max_pixels)
    if any(_WNID.fullmatch(path.name) for folder in (source, *(source / name for name in SPLITS)) if folder.is_dir()
           for path in folder.iterdir()):
        return FolderImagenet(source, source, max_pixels)
    raise InputError(f"source {source}: no ImageNet: neither {_TARS['train'][0]} or {_TARS['val'][0]}, nor "
                     "ILSVRC/Data/CLS-LOC, nor data/train-*.parquet, nor folders named by WordNet ids such as n01440764")


class TarImagenet(FileRecords):
    """As published."""

    def __init__(self, root: Path, unpacked: Path, max_pixels: int) -> None:
        self.root, self.unpacked = root, unpacked
        found = {split: next((root / name for name in names if (root / name).is_file()), None)
                 for split, names in _TARS.items()}
        self.tars = {split: plain_tar(path, unpacked) for split, path in found.items() if path}
        self.parts = {split: Tars([path], nested=split == "train") for split, path in self.tars.items()}
        super().__init__(_Parts(self.parts), max_pixels)

    def listing(self) -> Listing:
        wnids, truth = self._kit() if "val" in self.tars else (None, [])
        entries: list[Entry] = []
        placed: list[Placed] = []
        rejects: list[Reject] = []
        newest = others = 0
        for split, part in self.parts.items():
            files = part.files(is_image)
            entries += [Entry(entry.name, entry.size, split.encode() + b"/" + entry.place) for entry in files.entries]
            rejects += [Reject(split, reject.source, reject.reason) for reject in files.rejects]
            newest, others = max(newest, files.newest), others + files.others
            names = [entry.name for entry in files.entries]
            if split == "val":
                if len(names) != len(truth):
                    raise InputError(f"{self.tars['val']}: {len(names)} images, but the development kit has {len(truth)} "
                                     "labels")
                placed += [(split, wnid) for wnid in truth]  # both in the order of the names
            else:
                placed += [(split, PurePosixPath(name).parts[0] if split == "train" else None) for name in names]
        strange = next((entry.name for entry, (split, wnid) in zip(entries, placed, strict=True)
                        if split == "train" and not _WNID.fullmatch(wnid or "")), None)
        if strange:
            raise InputError(f"{self.tars['train']}: {strange!r} is not in a tar named by a WordNet id, such as "
                             "n01440764.tar")
        digest = digest_of((entry.place.split(b"/")[0] + b"/" + entry.name.encode(errors="surrogateescape"), entry.size)
                           for entry in entries)
        words = f"ImageNet as published ({', '.join(path.name for path in self.tars.values())})"
        words += f", {others} other files left out" if others else ""
        return make_listing(entries, placed, digest, newest, rejects, words, wnids or ())

    def _kit(self) -> tuple[list[str], list[str]]:
        """(all WordNet ids, sorted; the WordNet id of each validation image, by the images' names in order)."""
        kit = next((self.root / name for name in _KIT if (self.root / name).exists()), None)
        if kit is None:
            raise InputError(f"source {self.root}: has no {_KIT[0]}, which has the labels of the validation images")
        meta, truth = (_kit_file(kit, name) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt"))
        wnids = read_synsets(meta, kit)
        try:
            return sorted(wnids.values()), [wnids[int(line)] for line in truth.decode().split()]
        except (ValueError, KeyError) as error:
            raise InputError(f"{kit}: ILSVRC2012_validation_ground_truth.txt: {error} is no id of meta.mat") from None


class _Parts:
    """Sources side by side: a place is the part's name, a slash and the place in it."""

    def __init__(self, parts: dict[str, Tars]) -> None:
        self.parts, self.path = parts, next(iter(parts.values())).path

    def files(self, keep: Any) -> Any:
        raise NotImplementedError("each part is listed by itself")

    def read(self, place: bytes, size: int, newest: int) -> bytes:
        part, _, inner = place.partition(b"/")
        return self.parts[part.decode()].read(inner, size, newest)


def read_synsets(data: bytes, kit: Path) -> dict[int, str]:
    """meta.mat → WordNet id by ILSVRC2012_ID, of the synsets without children: the classes. InputError when it is none."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        columns = (synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        return {int(number): str(wnid) for number, wnid, children in zip(*columns, strict=True) if int(children) == 0}
    except Exception as error:  # the library raises whatever the bytes lead it to
        raise InputError(f"{kit}: meta.mat: not readable: {error}") from None


def _kit_file(kit: Path, name: str) -> bytes:
    """A file of the development kit, packed or not."""
    try:
        if kit.is_dir():
            return (kit / "data" / name).read_bytes()
        with tarfile.open(kit) as archive:
            member = next(member for member in archive if PurePosixPath(member.name).name == name and member.isreg())
            content = archive.extractfile(member)
            assert content is not None, "a regular member has content"
            return content.read()
    except (OSError, tarfile.TarError, EOFError, StopIteration) as error:
        raise InputError(f"{kit}: {name}: cannot be read: {error or 'not in the archive'}") from None


class FolderImagenet(FileRecords):
    """Kaggle's, or folders named by WordNet ids."""

    def __init__(self, root: Path, images: Path, max_pixels: int) -> None:
        super().__init__(Folder(images), max_pixels)
        self.root, self.images = root, images

    def listing(self) -> Listing:
        files = self.source.files(is_image)
        mapping = self.root / "LOC_synset_mapping.txt"
        lines = mapping.read_text().splitlines() if mapping.exists() else []
        wnids = sorted(line.split()[0] for line in lines if line.strip())
        solution, rejects = self._solution(), list(files.rejects)
        kept, placed = [], []
        for entry in files.entries:
            split, wnid = self._place(entry.name, solution)
            if split != "test" and wnid is None:
                flat = split == "val" and len(PurePosixPath(entry.name).parts) == 2
                rejects.append(Reject(split or "", entry.name, "no label in LOC_val_solution.csv" if flat
                                      else "not in a folder named by a WordNet id"))
            elif wnids and wnid is not None and wnid not in wnids:
                rejects.append(Reject(split or "", entry.name, f"its class {wnid} is not in {mapping.name}"))
            else:
                kept.append(entry)
                placed.append((split, wnid))
        present = {PurePosixPath(entry.name).stem for entry in files.entries if solution}
        rejects += [Reject("val", name, "in LOC_val_solution.csv, but there is no such image")
                    for name in solution if name not in present and (self.images / "val").is_dir()]
        if not kept:
            raise InputError(f"source {self.root}: holds no images in folders named by WordNet ids")
        shape = "Kaggle's" if self.images != self.root else "in folders by class"
        words = f"ImageNet, {shape}" + (f", {files.words()}" if files.others else "")
        counts = Counter(split for split, _ in placed)
        missing = [name for name in ("train", "val") if counts[None] == 0 and not counts[name]]
        words += "".join(f", no {name} images" for name in missing)
        return make_listing(kept, placed, files.digest, files.newest, rejects, words, wnids)

    def _place(self, name: str, solution: dict[str, str]) -> Placed:
        parts = PurePosixPath(name).parts
        split = SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
        inner = parts[1:] if split else parts
        if len(inner) > 1:
            return split, inner[0] if _WNID.fullmatch(inner[0]) else None
        return split, solution.get(PurePosixPath(name).stem) if split == "val" else None

    def _solution(self) -> dict[str, str]:
        """WordNet id by the name of a validation image."""
        path = self.root / "LOC_val_solution.csv"
        if not path.exists():
            return {}
        rows = read_table(path)
        name, answer = column_of(rows, ("imageid",), path), column_of(rows, ("predictionstring",), path)
        return {row[name]: row[answer].split()[0] for row in rows if row[answer].split()}


class ParquetImagenet:
    """Hugging Face's. A row group is read at once, so its images are a block."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels, self.files = folder, max_pixels, _parquet_files(folder)
        self._group: tuple[tuple[int, int], list[dict[str, Any]]] = ((-1, -1), [])

    def listing(self) -> Listing:
        items, names, newest, block = Items(), list[str](), 0, 0
        parts: list[tuple[bytes, int]] = []
        for number, path in enumerate(self.files):
            split = SPLITS[path.name.split("-")[0]]
            newest = max(newest, path.stat().st_mtime_ns)
            file = _open_parquet(path)
            names = names or _hub_names(file)
            for group in range(file.num_row_groups):
                facts = file.metadata.row_group(group)
                labels = file.read_row_group(group, columns=["label"])["label"].to_pylist()
                size = -(-facts.total_byte_size // max(facts.num_rows, 1))  # what one takes on average
                parts.append((f"{path.name} {group} {facts.total_byte_size}".encode(), facts.num_rows))
                for row, label in enumerate(labels):
                    known = label is not None and label >= 0
                    items.add(split, label if known else None, b"%d:%d:%d" % (number, group, row), size, block)
                block += 1
        table = items.table()
        highest = max((label for label in table["label"].to_pylist() if label is not None), default=-1)
        names = names if len(names) > highest else [str(number) for number in range(highest + 1)]
        return Listing(table, digest_of(parts), newest, names, found=f"ImageNet in {len(self.files)} Parquet files")

    def records(self, items: Sequence[Item], rejects: list[Reject], newest: int) -> Iterator[Record]:
        for item in items:
            number, group, row = map(int, item.place.split(b":"))
            path = self.files[number]
            if self._group[0] != (number, group):
                if path.stat().st_mtime_ns > newest:
                    raise WorkError(f"{path}: changed since the preparation began")
                columns = _open_parquet(path).read_row_group(group, columns=["image"])
                self._group = (number, group), columns["image"].to_pylist()
            image = self._group[1][row]
            name = (image or {}).get("path") or f"{path.name} row group {group} row {row}"
            try:
                if not image or image.get("bytes") is None:
                    raise ValueError("the row has no image bytes")
                yield image_record(item, image["bytes"], self.max_pixels, {"source": name})
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))


def _parquet_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if _PARQUET.fullmatch(path.name)) if folder.is_dir() else []


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}") from None
    missing = {"image", "label"} - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path}: no column {' and '.join(map(repr, sorted(missing)))}")
    return file


def _hub_names(file: pq.ParquetFile) -> list[str]:
    """Class names, where the Hub's library has left them in the schema."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        return list(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return []
