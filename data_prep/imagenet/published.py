"""Read ImageNet as published: two or three tars, and the development kit, which has the labels."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path, PurePosixPath

from data_prep.file_records import FileRecords
from data_prep.folder import SplitAndClass, make_listing
from data_prep.imagenet.wordnet import WNID
from data_prep.items import Listing
from data_prep.sources import CombinedSource, is_image
from data_prep.tables import first_existing
from data_prep.tars import Tar, decompressed_tar
from r2id.data.manifest import Reject
from r2id.errors import InputError

TARS = {
    "train": ("ILSVRC2012_img_train.tar",),
    "val": ("ILSVRC2012_img_val.tar",),
    "test": ("ILSVRC2012_img_test_v10102019.tar", "ILSVRC2012_img_test.tar"),
}
_KIT = ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_KIT_LARGEST = 10**8  # bytes of one file of the kit; the real ones take less than 10⁶


class TarImagenet(FileRecords):
    """Reads the published tars."""

    def __init__(self, root: Path, unpacked: Path, max_pixels: int) -> None:
        found = {
            split: next((root / name for name in names if (root / name).is_file()), None)
            for split, names in TARS.items()
        }
        self.root = root
        self.tars = {
            split: decompressed_tar(path, unpacked) for split, path in found.items() if path
        }
        super().__init__(
            CombinedSource(
                {split: Tar(path, nested=split == "train") for split, path in self.tars.items()}
            ),
            max_pixels,
        )

    def listing(self) -> Listing:
        """List all images; InputError when the validation images and labels differ in number."""
        files = self.source.files(is_image)
        wnids, truth = self._kit() if "val" in self.tars else ([], [])
        images = sum(entry.name.startswith("val/") for entry in files)
        if images != len(truth):
            raise InputError(
                f"{self.tars['val']}: {images} images, but the development kit has "
                f"{len(truth)} labels"
            )
        # The kit lists the labels in the order of the images' names, which is not that of the tar;
        # ``files`` are sorted by name.
        labels = iter(truth)
        classes = set(wnids)
        shared: dict[SplitAndClass, SplitAndClass] = {}
        assigned = []
        for entry in files:
            split, inner, *_ = entry.name.split("/")
            pair = split, inner if split == "train" else next(labels) if split == "val" else None
            if split == "train":
                self._check_class(inner, entry.name, classes)
            assigned.append(shared.setdefault(pair, pair))
        rejects = [
            Reject(reject.source.split("/")[0], reject.source, reject.reason)
            for reject in files.rejects
        ]
        found = [
            f"ImageNet as published ({', '.join(path.name for path in self.tars.values())})",
            *(f"no {split} images" for split in ("train", "val") if split not in self.tars),
            files.note(),
        ]
        return make_listing(files, assigned, files.digest, files.newest, rejects, found, wnids)

    def _check_class(self, wnid: str, name: str, classes: set[str]) -> None:
        if not WNID.fullmatch(wnid):
            raise InputError(
                f"{self.tars['train']}: {name.removeprefix('train/')!r} is not in a tar named by "
                "a WordNet id, "
                "such as n01440764.tar"
            )
        if classes and wnid not in classes:
            raise InputError(
                f"{self.tars['train']}: class {wnid} is none of the {len(classes)} of the "
                "development kit"
            )

    def _kit(self) -> tuple[list[str], list[str]]:
        """Read the development kit.

        Returns all WordNet ids, sorted, and the WordNet id of each validation image, in the order
        of the images' names.
        """
        kit = first_existing(self.root, ("",), _KIT)
        if kit is None:
            raise InputError(
                f"source {self.root}: has no {_KIT[0]}, which has the labels of the "
                "validation images"
            )
        meta, truth = (_kit_file(kit, name) for name in ("meta.mat", _TRUTH))
        wnids = read_synsets(meta, kit)
        try:
            return sorted(wnids.values()), [wnids[int(line)] for line in truth.decode().split()]
        except (ValueError, KeyError) as error:
            raise InputError(f"{kit}: {_TRUTH}: {error} is no id of meta.mat") from None


def read_synsets(data: bytes, kit: Path) -> dict[int, str]:
    """Read meta.mat: WordNet ids of the classes by their ILSVRC2012_ID.

    Classes are the synsets without children; the others are inner nodes of the hierarchy.
    """
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        columns = (synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        return {
            int(number): str(wnid)
            for number, wnid, children in zip(*columns, strict=True)
            if int(children) == 0
        }
    except Exception as error:  # SciPy raises errors of many types for damaged bytes
        raise InputError(f"{kit}: meta.mat: not readable: {error}") from None


def _kit_file(kit: Path, name: str) -> bytes:
    """Read a file of the development kit, which may be a folder or a compressed tar."""
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
                    f"{kit}: {name}: {member.size} bytes, more than the {_KIT_LARGEST} that "
                    "it may have"
                )
            content = archive.extractfile(member)
            assert content is not None, "a regular member has content"
            return content.read()
    except (OSError, tarfile.TarError, EOFError, StopIteration) as error:
        raise InputError(
            f"{kit}: {name}: cannot be read: {error or 'not in the archive'}"
        ) from None
