"""Read CIFAR-10 and CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour photos of 32×32 pixels.

Each is published as pickles of Python 2 and as binary files. A pickle can name any function to be
called; here it gets stand-ins for the three of NumPy that the published files name, and no others.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_prep.arrays import ArrayReader
from data_prep.sources import Entry, Files, Source
from data_prep.tables import first_existing
from data_prep.tars import open_source
from r2id.errors import InputError

_SHAPE = (3, 32, 32)  # colours, height, width
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Layout:
    """The names of a dataset's files in one of the two forms."""

    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    """The file of the classes' names."""
    keys: tuple[str, str] | None = None
    """Of pickles: the keys of labels and of names. Others are binary."""
    place: int = 0
    """Of binary files: where in a row the label is; the pixels follow."""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.names)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_CIFAR10 = (
    _Layout(
        "cifar-10-python.tar.gz",
        _BATCHES,
        "test_batch",
        "batches.meta",
        keys=("labels", "label_names"),
    ),
    _Layout(
        "cifar-10-binary.tar.gz",
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        "batches.meta.txt",
    ),
)
_CIFAR100 = (
    _Layout(
        "cifar-100-python.tar.gz",
        ("train",),
        "test",
        "meta",
        keys=("fine_labels", "fine_label_names"),
    ),
    _Layout("cifar-100-binary.tar.gz", ("train.bin",), "test.bin", "fine_label_names.txt", place=1),
)


def open_cifar10(source: Path, unpacked: Path, _max_pixels: int) -> ArrayReader:
    """Read CIFAR-10 from its folder, the folder above, or its archive."""
    return _open(source, unpacked, _CIFAR10)


def open_cifar100(source: Path, unpacked: Path, _max_pixels: int) -> ArrayReader:
    """Read CIFAR-100 likewise, with its 100 fine classes."""
    return _open(source, unpacked, _CIFAR100)


def _open(path: Path, unpacked: Path, layouts: tuple[_Layout, ...]) -> ArrayReader:
    source = open_source(path, unpacked)
    files = _list(source, layouts)
    if not files and path.is_dir():
        archive = first_existing(path, ("",), [layout.archive for layout in layouts])
        if archive:
            source = open_source(archive, unpacked)
            files = _list(source, layouts)
    layout, entries = _choose(path, files, layouts)

    def read(name: str) -> tuple[bytes, str]:
        entry = entries[name]
        where = f"{source.path}: {entry.name}"
        try:
            return source.read(entry.place, entry.size, files.newest), where
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None

    names = _class_names(*read(layout.names), layout)
    splits = {}
    for split, batches in (("train", layout.train), ("test", (layout.test,))):
        parts = [_batch(*read(name), layout, len(names)) for name in batches]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        splits[split] = images.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), labels
    return ArrayReader(splits, names, files.newest)


def _list(source: Source, layouts: tuple[_Layout, ...]) -> Files:
    known = {name for layout in layouts for name in layout.files}
    return source.files(lambda name: PurePosixPath(name).name in known)


def _choose(
    path: Path, files: Files, layouts: tuple[_Layout, ...]
) -> tuple[_Layout, dict[str, Entry]]:
    """Return the layout of the one folder that holds all files of one, and the files by name."""
    folders: dict[str, dict[str, Entry]] = {}
    for entry in files:
        folder, _, name = entry.name.rpartition("/")
        folders.setdefault(folder, {})[name] = entry
    pairs = [(folder, layout) for folder in folders for layout in layouts]
    whole = [pair for pair in pairs if folders[pair[0]].keys() >= set(pair[1].files)]
    if len(whole) > 1:
        raise InputError(
            f"source {path}: holds several copies "
            f"({', '.join(f'{folder}/{layout.test}' for folder, layout in whole)}): give the "
            "folder of one"
        )
    if not whole:
        # The folder that lacks the fewest files tells most.
        lacking = [
            [f"{folder}/{name}".lstrip("/") for name in layout.files if name not in found]
            for layout in layouts
            for folder, found in (folders or {"": {}}).items()
        ]
        raise InputError(
            f"source {path}: has no {min(lacking, key=len)[0]}: must hold the files of "
            f"{' or '.join(layout.archive for layout in layouts)}"
        )
    folder, layout = whole[0]
    return layout, folders[folder]


def _class_names(data: bytes, where: str, layout: _Layout) -> list[str]:
    if layout.keys is None:
        lines: Any = data.split(b"\n")
    else:
        lines = _unpickle(data, where).get(layout.keys[1].encode())
    try:
        names = [line.decode().strip() for line in lines]
    except (AttributeError, TypeError, ValueError):
        names = []
    if not any(names):
        raise InputError(f"{where}: holds no names of classes")
    return list(filter(None, names))


def _batch(data: bytes, where: str, layout: _Layout, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels uint8 [N, 3072] and the labels [N] of one file."""
    if layout.keys is None:
        row = layout.place + 1 + _PIXELS
        if not data or len(data) % row:
            raise InputError(
                f"{where}: truncated or damaged: {len(data)} bytes, no multiple of {row}"
            )
        rows = np.frombuffer(data, np.uint8).reshape(-1, row)
        images, labels = rows[:, layout.place + 1 :], rows[:, layout.place].astype(np.int64)
    else:
        content = _unpickle(data, where)
        stored: Any = content.get(b"data")
        numbers = content.get(layout.keys[0].encode())
        try:
            images, labels = stored.array(), np.array(numbers, np.int64)
        except (AttributeError, TypeError, ValueError, OverflowError):
            images, labels = np.empty((0, 0), np.uint8), np.empty(0, np.int64)
        if images.shape != (len(labels), _PIXELS) or labels.ndim != 1 or not len(labels):
            raise InputError(
                f"{where}: must hold 'data' of bytes [N, {_PIXELS}] and N {layout.keys[0]!r}"
            )
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{where}: classes {labels.min()} to {labels.max()}: must be from 0 to {classes - 1}"
        )
    return images, labels


class _Array:
    """Stands in for NumPy's ndarray and the function that begins one, and keeps what it holds."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Make the array of bytes; TypeError or ValueError when it is none."""
        _, shape, dtype, by_columns, data = self.state
        if not isinstance(dtype, _Type) or dtype.name != b"u1" or not isinstance(data, bytes):
            raise TypeError("not an array of bytes")
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


class _Type:
    """Stands in for NumPy's dtype."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _state: Any) -> None:
        pass


_KNOWN = {
    "numpy.core.multiarray._reconstruct": _Array,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Type,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _KNOWN:
            raise pickle.UnpicklingError(f"names {module}.{name}, which the published files do not")
        return _KNOWN[f"{module}.{name}"]


def _unpickle(data: bytes, where: str) -> dict[Any, Any]:
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except Exception as error:  # damaged pickles fail in many ways
        raise InputError(f"{where}: not a readable pickle of CIFAR: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{where}: not a pickle of CIFAR: it holds no dictionary")
    return content
