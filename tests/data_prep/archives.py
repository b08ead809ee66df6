"""Write small archives of images, and read the table of rejects."""

import csv
import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


NAMES = [
    f"pets/{split}/{label}/{number}.png"
    for split in ("train", "test")
    for label in ("cat", "dog")
    for number in range(9)
]
IMAGES = {name: picture(number) for number, name in enumerate(NAMES)}


def write_tar(path, members, mode="w", prefix="", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        archive.addfile(directory("pets"))
        for name, data in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


ARCHIVES = {
    "tar": ("pets.tar", lambda path: write_tar(path, IMAGES)),
    "tar with ./": ("pets.tar", lambda path: write_tar(path, IMAGES, prefix="./")),
    "old tar": ("pets.tar", lambda path: write_tar(path, IMAGES, form=tarfile.GNU_FORMAT)),
    "tar.gz": ("pets.tar.gz", lambda path: write_tar(path, IMAGES, "w:gz")),
    "tar.xz": ("pets.tar.xz", lambda path: write_tar(path, IMAGES, "w:xz")),
    "tar.bz2": ("pets.tbz", lambda path: write_tar(path, IMAGES, "w:bz2")),
    "zip": ("pets.zip", lambda path: write_zip(path, IMAGES)),
}


def rejected(out):
    """Return the reasons of a set's rejects by their source."""
    with (out / "rejects.csv").open(newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}
