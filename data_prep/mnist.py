"""Read MNIST (LeCun, Cortes & Burges) and similar datasets from IDX files.

MNIST has 60,000 training and 10,000 test images of 28×28 pixels. Fashion-MNIST, KMNIST and EMNIST
have the same format.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import re
import urllib.request
import zlib
from pathlib import Path
from typing import IO

import numpy as np

from data_prep.arrays import ArrayReader
from r2id.errors import InputError, WorkError
from r2id.files import sha256_file, write_atomic
from r2id.progress import say

_PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
_NAME = re.compile(
    r"(emnist-[a-z]+-)?(?P<split>train|t10k|test)-(?P<what>images|labels)"
    r"[-.](?P<kind>idx[13])-ubyte(\.gz)?"
)
_UNSIGNED_BYTE = 8  # IDX's code of the type
_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_CHECKSUMS = {  # SHA-256 of the uncompressed files
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_CHUNK = 1 << 24  # bytes
_TIMEOUT = 60  # seconds without an answer


def open_mnist(source: Path | None, downloads: Path, _max_pixels: int) -> ArrayReader:
    """Read the four IDX files, ``.gz`` or not, from ``source``; download MNIST where it is None.

    The files may lie in ``source`` itself, in raw/, or in MNIST/raw, FashionMNIST/raw and so on.
    Their names are those of MNIST or EMNIST (``emnist-letters-train-images-idx3-ubyte``), with
    ``-idx`` or ``.idx``. Raises InputError that names a missing, truncated or wrong file.
    """
    folder = download(downloads) if source is None else _find(source)
    splits, newest = {}, 0
    for split, prefixes in _PREFIXES.items():
        images_file, labels_file = (
            _existing(folder, prefixes, part) for part in ("images-idx3-ubyte", "labels-idx1-ubyte")
        )
        images, labels = read_idx(images_file, dimensions=3), read_idx(labels_file, dimensions=1)
        if len(images) != len(labels):
            raise InputError(
                f"{labels_file}: {len(labels)} labels for the {len(images)} images of "
                f"{images_file.name}"
            )
        if not images.size:
            raise InputError(f"{images_file}: holds no pixels: its sizes are {images.shape}")
        splits[split] = images, labels
        newest = max(newest, *(file.stat().st_mtime_ns for file in (images_file, labels_file)))
    classes = 1 + max(int(labels.max()) for _, labels in splits.values())
    return ArrayReader(splits, [str(number) for number in range(classes)], newest)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes as an array of this number of dimensions.

    The format is a magic number (0, 0, type, dimensions), the sizes as big-endian uint32, then the
    values. Only as many bytes are decompressed as the sizes state, so a forged ``.gz`` cannot fill
    the memory.
    """
    start = 4 + 4 * dimensions
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(start)
            if head[:4] != bytes((0, 0, _UNSIGNED_BYTE, dimensions)):
                raise InputError(
                    f"{path}: not an IDX file of {dimensions}-dimensional bytes: it begins with "
                    f"{head[:4].hex(' ') or 'nothing'}, not 00 00 08 {dimensions:02x}"
                )
            if len(head) < start:
                raise InputError(
                    f"{path}: truncated or damaged: ends in its header, after {len(head)} bytes"
                )
            shape = np.frombuffer(head[4:], dtype=">u4").astype(np.int64)
            expected = math.prod(shape.tolist())
            values = _read_up_to(file, expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: truncated or unreadable: {error}") from None
    if len(values) != expected:
        raise InputError(
            f"{path}: truncated or damaged: "
            f"{'more' if len(values) > expected else len(values) + start} bytes, "
            f"not {start + expected} bytes"
        )
    return np.frombuffer(values, dtype=np.uint8).reshape(shape)


def _read_up_to(file: IO[bytes] | gzip.GzipFile, most: int) -> bytes:
    """Read at most ``most`` bytes, in parts: a forged header may ask for more than fits memory."""
    parts, left = [], most
    while left and (part := file.read(min(left, _CHUNK))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def download(folder: Path) -> Path:
    """Download those of the four files that are missing or damaged, and return the folder.

    Raises WorkError when no mirror delivers them.
    """
    for name, checksum in _CHECKSUMS.items():
        path = folder / name
        if not (path.is_file() and sha256_file(path) == checksum):
            say(f"downloading {name}")
            write_atomic(path, _fetch(f"{name}.gz", checksum))
    return folder


def _fetch(name: str, checksum: str) -> bytes:
    """Return the uncompressed content of a file from the first mirror that delivers it intact."""
    reasons = []
    for mirror in _MIRRORS:
        try:
            with urllib.request.urlopen(mirror + name, timeout=_TIMEOUT) as response:
                data = gzip.decompress(response.read())
        # HTTP and connection errors are OSErrors.
        except (OSError, EOFError, zlib.error) as error:
            reasons.append(f"{mirror}: {error}")
            continue
        if hashlib.sha256(data).hexdigest() == checksum:
            return data
        reasons.append(f"{mirror}: wrong checksum")
    raise WorkError(
        f"{name}: cannot be downloaded ({'; '.join(reasons)}): give the folder of the files as "
        "source"
    )


def _find(source: Path) -> Path:
    """Return the folder of the IDX files in or below the source."""
    if not source.is_dir():
        raise InputError(f"source {source}: no such folder")
    if any(_NAME.fullmatch(path.name) for path in source.iterdir()):
        return source
    nested = [
        path for path in (source / "raw", *sorted(source.glob("*MNIST/raw"))) if path.is_dir()
    ]
    if len(nested) > 1:
        raise InputError(
            f"source {source}: holds several datasets "
            f"({', '.join(path.parent.name for path in nested)}): give the folder of one"
        )
    return nested[0] if nested else source


def _existing(folder: Path, prefixes: tuple[str, ...], part: str) -> Path:
    """Return the only file of this split and content; InputError when there are none or several."""
    found = sorted(
        path
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name))
        and path.is_file()
        and match["split"] in prefixes
        and part == f"{match['what']}-{match['kind']}-ubyte"
    )
    if not found:
        raise InputError(f"source {folder}: has no {prefixes[0]}-{part}, with or without .gz")
    kinds = {path.name.removesuffix(".gz") for path in found}
    if len(kinds) > 1:
        raise InputError(
            f"source {folder}: holds several datasets ({', '.join(sorted(kinds))}): give a folder "
            "of one"
        )
    return found[0]
