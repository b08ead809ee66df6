"""ImageNet in folders named by WordNet ids: Kaggle's copy, or any such tree."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from data_prep.file_records import FileRecords
from data_prep.folder import SPLITS, SplitAndClass, make_listing
from data_prep.imagenet.wordnet import WNID
from data_prep.items import Listing
from data_prep.sources import Folder, is_image
from data_prep.tables import column_of, first_existing, read_rows
from r2id.data.manifest import Reject
from r2id.errors import InputError

_SOLUTION, _MAPPING = "LOC_val_solution.csv", "LOC_synset_mapping.txt"


class FolderImagenet(FileRecords):
    """Reads folders named by WordNet ids; in Kaggle's copy val/ is flat, with labels in a table."""

    def __init__(self, root: Path, images: Path, max_pixels: int) -> None:
        super().__init__(Folder(images), max_pixels)
        self.root, self.images = root, images

    def listing(self) -> Listing:
        """List the images; those without a known class are rejected, except in the test split."""
        files, solution, wnids = self.source.files(is_image), self._solution(), self._wnids()
        rejects, classes, unseen = list(files.rejects), set(wnids), dict(solution)
        shared: dict[SplitAndClass, SplitAndClass] = {}
        places: list[SplitAndClass | None] = []
        for entry in files:
            pair = self._split_and_class(entry.name, solution)
            reason = self._refuse(entry.name, *pair, classes)
            if reason:
                rejects.append(Reject(pair[0] or "", entry.name, reason))
            places.append(None if reason else shared.setdefault(pair, pair))
            unseen.pop(PurePosixPath(entry.name).stem, None)
        if (self.images / "val").is_dir():
            rejects += [
                Reject("val", name, f"in {_SOLUTION}, but there is no such image")
                for name in unseen
            ]
        assigned = [pair for pair in places if pair]
        if not assigned:
            raise InputError(f"source {self.root}: holds no images in folders named by WordNet ids")
        splits = {split for split, _ in shared}
        found = [
            "ImageNet, Kaggle's" if self.images != self.root else "ImageNet, in folders by class",
            *(
                f"no {split} images"
                for split in ("train", "val")
                if None not in splits and split not in splits
            ),
            files.note(),
        ]
        kept = (entry for entry, pair in zip(files, places, strict=True) if pair)
        return make_listing(kept, assigned, files.digest, files.newest, rejects, found, wnids)

    def _wnids(self) -> list[str]:
        """Return all WordNet ids, sorted, or none where Kaggle's mapping is missing."""
        mapping = first_existing(self.root, ("", ".."), (_MAPPING,))
        lines = (
            mapping.read_text(encoding="utf-8", errors="replace").splitlines() if mapping else []
        )
        return sorted(line.split()[0] for line in lines if line.strip())

    @staticmethod
    def _refuse(name: str, split: str | None, wnid: str | None, classes: set[str]) -> str:
        """Return why an image cannot be used; empty when it can."""
        if wnid is None and split != "test":
            flat = split == "val" and name.count("/") == 1
            return f"no label in {_SOLUTION}" if flat else "not in a folder named by a WordNet id"
        return (
            f"its class {wnid} is not in {_MAPPING}"
            if classes and wnid is not None and wnid not in classes
            else ""
        )

    def _split_and_class(self, name: str, solution: dict[str, str]) -> SplitAndClass:
        """Return an image's split and WordNet id, from its folders or Kaggle's table."""
        parts = PurePosixPath(name).parts
        split = SPLITS.get(parts[0].lower()) if len(parts) > 1 else None
        inner = parts[1:] if split else parts
        if len(inner) > 1:
            return split, inner[0] if WNID.fullmatch(inner[0]) else None
        return split, solution.get(PurePosixPath(name).stem) if split == "val" else None

    def _solution(self) -> dict[str, str]:
        """Read Kaggle's table: the WordNet id of each validation image, by its name."""
        # Kaggle's archive has the table beside ILSVRC/, which may itself be the source.
        path = first_existing(self.root, ("", ".."), (_SOLUTION,))
        if path is None:
            val = self.images / "val"
            if val.is_dir() and any(is_image(child.name) for child in val.iterdir()):
                raise InputError(
                    f"source {self.root}: has no {_SOLUTION}, which has the labels of the "
                    f"images in {val}"
                )
            return {}
        rows = read_rows(path)
        _, header = next(rows)
        name, answer = (
            column_of(header, ("imageid",), path),
            column_of(header, ("predictionstring",), path),
        )
        return {row[name]: row[answer].split()[0] for _, row in rows if row[answer].split()}
