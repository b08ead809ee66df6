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
from data_prep.files import FileRecords, column_of, first_existing, image_record, read_rows
from data_prep.folder import SPLITS, Placed, make_listing
from data_prep.sources import Folder, Several, is_image, time_of
from data_prep.tars import Tar, plain_tar
from r2id.data.manifest import Reject
from r2id.data.records import Record
from r2id.errors import InputError, WorkError

_TARS = {
    "train": ("ILSVRC2012_img_train.tar",),
    "val": ("ILSVRC2012_img_val.tar",),
    "test": ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar"),
}
_KIT = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_KIT_LARGEST = 10**8  # bytes of one of its files; the real ones have less than one per cent of that
_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"
_WNID = re.compile(r"n\d{8}")
_PARQUET = re.compile(r"(train|validation|val|test)-\d+-of-(\d+).*\.parquet")


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
    if any(
        _WNID.fullmatch(path.name)
        for folder in (source, *(source / name for name in SPLITS))
        if folder.is_dir()
        for path in folder.iterdir()
    ):
        return FolderImagenet(source, source, max_pixels)
    raise InputError(
        f"source {source}: no ImageNet: neither {_TARS['train'][0]} or {_TARS['val'][0]}, nor "
        "ILSVRC/Data/CLS-LOC, nor data/train-*.parquet, nor folders named by WordNet ids such as n01440764"
    )


class TarImagenet(FileRecords):
    """As published."""

    def __init__(self, root: Path, unpacked: Path, max_pixels: int) -> None:
        found = {
            split: next((root / name for name in names if (root / name).is_file()), None)
            for split, names in _TARS.items()
        }
        self.root = root
        self.tars = {split: plain_tar(path, unpacked) for split, path in found.items() if path}
        super().__init__(
            Several(
                {split: Tar(path, nested=split == "train") for split, path in self.tars.items()}
            ),
            max_pixels,
        )

    def listing(self) -> Listing:
        files = self.source.files(is_image)
        wnids, truth = self._kit() if "val" in self.tars else ([], [])
        images = sum(entry.name.startswith("val/") for entry in files)
        if images != len(truth):
            raise InputError(
                f"{self.tars['val']}: {images} images, but the development kit has {len(truth)} labels"
            )
        labels = iter(truth)  # the kit has them in the order of the images' names
        known = set(wnids)
        shared: dict[Placed, Placed] = {}
        placed = []
        for entry in files:
            split, inner, *_ = entry.name.split("/")
            pair = split, inner if split == "train" else next(labels) if split == "val" else None
            if split == "train":
                self._check_class(inner, entry.name, known)
            placed.append(shared.setdefault(pair, pair))
        rejects = [
            Reject(reject.source.split("/")[0], reject.source, reject.reason)
            for reject in files.rejects
        ]
        found = [
            f"ImageNet as published ({', '.join(path.name for path in self.tars.values())})",
            *(f"no {split} images" for split in ("train", "val") if split not in self.tars),
            files.words(),
        ]
        return make_listing(files, placed, files.digest, files.newest, rejects, found, wnids)

    def _check_class(self, wnid: str, name: str, known: set[str]) -> None:
        if not _WNID.fullmatch(wnid):
            raise InputError(
                f"{self.tars['train']}: {name.removeprefix('train/')!r} is not in a tar named by a WordNet id, "
                "such as n01440764.tar"
            )
        if known and wnid not in known:
            raise InputError(
                f"{self.tars['train']}: class {wnid} is none of the {len(known)} of the development kit"
            )

    def _kit(self) -> tuple[list[str], list[str]]:
        """(all WordNet ids, sorted; the WordNet id of each validation image, by the images' names in order)."""
        kit = first_existing(self.root, ("",), _KIT)
        if kit is None:
            raise InputError(
                f"source {self.root}: has no {_KIT[0]}, which has the labels of the validation images"
            )
        meta, truth = (
            _kit_file(kit, name) for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
        )
        wnids = read_synsets(meta, kit)
        try:
            return sorted(wnids.values()), [wnids[int(line)] for line in truth.decode().split()]
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{kit}: ILSVRC2012_validation_ground_truth.txt: {error} is no id of meta.mat"
            ) from None


def read_synsets(data: bytes, kit: Path) -> dict[int, str]:
    """meta.mat → WordNet id by ILSVRC2012_ID, of the synsets without children: the classes. InputError when it is none."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        columns = (synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        return {
            int(number): str(wnid)
            for number, wnid, children in zip(*columns, strict=True)
            if int(children) == 0
        }
    except Exception as error:  # the library raises whatever the bytes lead it to
        raise InputError(f"{kit}: meta.mat: not readable: {error}") from None


def _kit_file(kit: Path, name: str) -> bytes:
    """A file of the development kit, packed or not."""
    try:
        if kit.is_dir():
            return (kit / "data" / name).read_bytes()
        with tarfile.open(kit) as archive:
            member = next(
                member
                for member in archive
                if PurePosixPath(member.name).name == name and member.isreg()
            )
            if member.size > _KIT_LARGEST:
                raise InputError(
                    f"{kit}: {name}: {member.size} bytes, more than the {_KIT_LARGEST} that it may have"
                )
            content = archive.extractfile(member)
            assert content is not None, "a regular member has content"
            return content.read()
    except (OSError, tarfile.TarError, EOFError, StopIteration) as error:
        raise InputError(
            f"{kit}: {name}: cannot be read: {error or 'not in the archive'}"
        ) from None


class FolderImagenet(FileRecords):
    """Kaggle's, or folders named by WordNet ids."""

    def __init__(self, root: Path, images: Path, max_pixels: int) -> None:
        super().__init__(Folder(images), max_pixels)
        self.root, self.images = root, images

    def listing(self) -> Listing:
        files, solution, wnids = self.source.files(is_image), self._solution(), self._wnids()
        rejects, known, unseen = list(files.rejects), set(wnids), dict(solution)
        shared: dict[Placed, Placed] = {}
        places: list[Placed | None] = []
        for entry in files:
            pair = self._place(entry.name, solution)
            reason = self._refuse(entry.name, *pair, known)
            if reason:
                rejects.append(Reject(pair[0] or "", entry.name, reason))
            places.append(None if reason else shared.setdefault(pair, pair))
            unseen.pop(PurePosixPath(entry.name).stem, None)
        if (self.images / "val").is_dir():
            rejects += [
                Reject("val", name, f"in {_SOLUTION}, but there is no such image")
                for name in unseen
            ]
        placed = [pair for pair in places if pair]
        if not placed:
            raise InputError(f"source {self.root}: holds no images in folders named by WordNet ids")
        splits = {split for split, _ in shared}
        found = [
            "ImageNet, Kaggle's" if self.images != self.root else "ImageNet, in folders by class",
            *(
                f"no {split} images"
                for split in ("train", "val")
                if None not in splits and split not in splits
            ),
            files.words(),
        ]
        kept = (entry for entry, pair in zip(files, places, strict=True) if pair)
        return make_listing(kept, placed, files.digest, files.newest, rejects, found, wnids)

    def _wnids(self) -> list[str]:
        """All WordNet ids, sorted, where the mapping is at hand."""
        mapping = first_existing(self.root, ("", ".."), (_MAPPING,))
        lines = mapping.read_text(errors="replace").splitlines() if mapping else []
        return sorted(line.split()[0] for line in lines if line.strip())

    @staticmethod
    def _refuse(name: str, split: str | None, wnid: str | None, known: set[str]) -> str:
        """Why an image cannot be used, or an empty text."""
        if wnid is None and split != "test":
            flat = split == "val" and name.count("/") == 1
            return f"no label in {_SOLUTION}" if flat else "not in a folder named by a WordNet id"
        return (
            f"its class {wnid} is not in {_MAPPING}"
            if known and wnid is not None and wnid not in known
            else ""
        )

    def _place(self, name: str, solution: dict[str, str]) -> Placed:
        parts = PurePosixPath(name).parts
        split = SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
        inner = parts[1:] if split else parts
        if len(inner) > 1:
            return split, inner[0] if _WNID.fullmatch(inner[0]) else None
        return split, solution.get(PurePosixPath(name).stem) if split == "val" else None

    def _solution(self) -> dict[str, str]:
        """WordNet id by the name of a validation image."""
        path = first_existing(
            self.root, ("", ".."), (_SOLUTION,)
        )  # the archive has it beside ILSVRC/
        if path is None:
            val = self.images / "val"
            if val.is_dir() and any(is_image(child.name) for child in val.iterdir()):
                raise InputError(
                    f"source {self.root}: has no {_SOLUTION}, which has the labels of the images in {val}"
                )
            return {}
        rows = read_rows(path)
        _, header = next(rows)
        name, answer = (
            column_of(header, ("imageid",), path),
            column_of(header, ("predictionstring",), path),
        )
        return {row[name]: row[answer].split()[0] for _, row in rows if row[answer].split()}


class ParquetImagenet:
    """Hugging Face's. A row group is read at once, so its images are a block."""

    def __init__(self, folder: Path, max_pixels: int) -> None:
        self.folder, self.max_pixels, self.files = folder, max_pixels, _parquet_files(folder)

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
                labels = _read_column(file, path, group, "label")
                size = _mean_size(facts)
                parts.append(
                    (f"{path.name} {group} {facts.total_byte_size}".encode(), facts.num_rows)
                )
                for row, label in enumerate(labels):
                    known = label is not None and label >= 0
                    items.add(
                        split,
                        label if known else None,
                        b"%d:%d:%d" % (number, group, row),
                        size,
                        block,
                    )
                block += 1
        table = items.table()
        highest = max(
            (label for label in table["label"].to_pylist() if label is not None), default=-1
        )
        names = names if len(names) > highest else [str(number) for number in range(highest + 1)]
        return Listing(
            table,
            digest_of(parts),
            newest,
            names,
            found=["ImageNet in Parquet files", *self._missing()],
        )

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        _embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        held: tuple[int, int] | None = None
        images: list[dict[str, Any] | None] = []
        for item in items:
            number, group, row = map(int, item.place.split(b":"))
            path = self.files[number]
            name = f"{path.name} row group {group} row {row}"
            try:
                if held != (number, group):
                    images, held = self._read(path, group, item.size, newest), (number, group)
                image = images[row]
                name = (image or {}).get("path") or name
                if not image or image.get("bytes") is None:
                    raise ValueError("the row has no image bytes")
                yield image_record(item, image["bytes"], self.max_pixels, {"source": name})
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def _read(self, path: Path, group: int, size: int, newest: int) -> list[dict[str, Any] | None]:
        """The images of a row group."""
        if time_of(path) > newest:
            raise WorkError(f"{path}: changed since the preparation began")
        with _open_parquet(path) as file:
            if group >= file.num_row_groups or _mean_size(file.metadata.row_group(group)) != size:
                raise WorkError(f"{path}: changed since the preparation began")
            return _read_column(file, path, group, "image")

    def _missing(self) -> list[str]:
        """In words: files that the names of the others promise, and splits."""
        parts = Counter(
            (found[1], int(found[2]))
            for path in self.files
            if (found := _PARQUET.fullmatch(path.name))
        )
        splits = {SPLITS[split] for split, _ in parts}
        return [
            *(f"{count} of {total} {split} files" for (split, total), count in parts.items()),
            *(f"no {split} images" for split in ("train", "val") if split not in splits),
        ]


def _mean_size(group: pq.RowGroupMetaData) -> int:
    """Bytes of a row group per image, rounded up; of a single image only its decoding would tell."""
    return -(-group.total_byte_size // max(group.num_rows, 1))


def _parquet_files(folder: Path) -> list[Path]:
    return (
        sorted(path for path in folder.glob("*.parquet") if _PARQUET.fullmatch(path.name))
        if folder.is_dir()
        else []
    )


def _open_parquet(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from None
    missing = {"image", "label"} - set(file.schema_arrow.names)
    if missing:
        raise InputError(f"{path}: no column {' and '.join(map(repr, sorted(missing)))}")
    return file


def _read_column(file: pq.ParquetFile, path: Path, group: int, column: str) -> list[Any]:
    try:
        return file.read_row_group(group, columns=[column])[column].to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"{path}: row group {group} cannot be read: {str(error).splitlines()[0]}"
        ) from None


def _hub_names(file: pq.ParquetFile) -> list[str]:
    """Class names, where the Hub's library has left them in the schema."""
    try:
        features = json.loads((file.schema_arrow.metadata or {})[b"huggingface"])["info"][
            "features"
        ]
        return list(features["label"]["names"])
    except (KeyError, ValueError, TypeError):
        return []
