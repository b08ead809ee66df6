"""MNIST (LeCun, Cortes & Burges) and its relatives in IDX files: 60,000 + 10,000 images of 28×28."""

from __future__ import annotations

import gzip
import hashlib
import re
import urllib.request
import zlib
from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayReader
from r2id.data.files import sha256_file, write_atomic
from r2id.errors import InputError, WorkError
from r2id.progress import say

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_UNSIGNED_BYTE = 8
_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/")
_CHECKSUMS = {  # SHA-256 of the uncompressed files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_TIMEOUT = 60  # seconds without an answer


def open_mnist(source: Path | None, downloads: Path) -> ArrayReader:
    """Read the four IDX files, ``.gz`` or not, from ``source`` or a raw/ folder in it; download MNIST without one.

    Names are those of MNIST or EMNIST (``emnist-letters-train-images-idx3-ubyte``), with ``-idx`` or ``.idx``. Raises
    InputError naming the file that is missing, truncated or no IDX file.
    """
    folder = download(downloads) if source is None else _find(source)
    splits, newest = {}, 0
    for split, prefixes in _PREFIXES.items():
        images_file, labels_file = (_existing(folder, prefixes, part) for part in ("images-idx3-ubyte", "labels-idx1-ubyte"))
        images, labels = read_idx(images_file, dimensions=3), read_idx(labels_file, dimensions=1)
        if len(images) != len(labels):
            raise InputError(f"{labels_file}: {len(labels)} labels for the {len(images)} images of {images_file.name}")
        if not images.size:
            raise InputError(f"{images_file}: holds no pixels: its sizes are {images.shape}")
        splits[split] = images, labels
        newest = max(newest, *(file.stat().st_mtime_ns for file in (images_file, labels_file)))
    classes = 1 + max(int(labels.max()) for _, labels in splits.values())
    return ArrayReader(splits, [str(number) for number in range(classes)], newest)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes: big-endian magic (0, 0, type, dimensions), sizes as uint32, then the values."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or unreadable: {error}") from None
    if data[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
        raise InputError(f"{path}: not an IDX file of {dimensions}-dimensional bytes: it begins with "
                         f"{data[:4].hex(' ') or 'nothing'}, not 00 00 08 {dimensions:02x}")
    start = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:start], dtype=">u4").astype(np.int64) if len(data) >= start else None
    if shape is None or len(data) != start + int(np.prod(shape)):
        expected = "its sizes" if shape is None else f"{start + int(np.prod(shape))} bytes"
        raise InputError(f"{path}: truncated or damaged: {len(data)} bytes, not {expected}")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def download(folder: Path) -> Path:
    """The four files in this folder, fetched where they are missing or damaged. WorkError when no mirror gives them."""
    for name, checksum in _CHECKSUMS.items():
        path = folder / name
        if not (path.is_file() and sha256_file(path) == checksum):
            say(f"downloading {name}")
            write_atomic(path, _fetch(f"{name}.gz", checksum))
    return folder


def _fetch(name: str, checksum: str) -> bytes:
    """The uncompressed content of a file, from the first mirror that has it right."""
    reasons = []
    for mirror in _MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=_TIMEOUT) as response:
                data = gzip.decompress(response.read())
        except (OSError, EOFError, zlib.error) as error:  # an HTTP or connection error is an OSError
            reasons.append(f"{mirror}: {error}")
            continue
        if hashlib.sha256(data).hexdigest() == checksum:
            return data
        reasons.append(f"{mirror}: wrong checksum")
    raise WorkError(f"{name}: cannot be downloaded ({'; '.join(reasons)}): give the folder of the files as source")


def _find(source: Path) -> Path:
    if not source.is_dir():
        raise InputError(f"source {source}: no such folder")
    nested = (path for path in (source / "MNIST" / "raw", source / "raw") if path.is_dir())
    return next(nested, source)


def _existing(folder: Path, prefixes: tuple[str, ...], part: str) -> Path:
    """The one file of this split and content."""
    pattern = re.compile(rf"(emnist-[a-z]+-)?({'|'.join(prefixes)})-{part.replace('-idx', '[-.]idx')}(\.gz)?")
    found = sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name) and path.is_file())
    if not found:
        raise InputError(f"source {folder}: has no {prefixes[0]}-{part}, with or without .gz")
    kinds = {path.name.removesuffix(".gz") for path in found}
    if len(kinds) > 1:
        raise InputError(f"source {folder}: holds several datasets ({', '.join(sorted(kinds))}): give a folder of one")
    return found[0]
