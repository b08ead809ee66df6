"""One checkpoint folder: what it says of itself, and its tensors, whole or in the slices that many ranks wrote.

``checkpoint.json`` names every file with its hash, and holds a hash of itself, so that no byte changes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from r2id.checkpoints.state import Shape, Slices
from r2id.config import Section
from r2id.config.renamed import renew_config
from r2id.errors import InputError
from r2id.files import fsync, sha256_file

FORMAT_VERSION = 2
_NO_DIGEST = "0" * 64


class Meta(Section):
    """What a checkpoint is."""

    stage: str
    step: int
    """Optimizer steps done, and so the position in the data and in every random stream: all are keyed by step."""
    samples: int
    """Training samples seen."""
    seed: int
    config: dict[str, Any]
    """The whole resolved config of the run."""
    model: dict[str, Any]
    """Facts beside the config that it takes to build the model and use it."""


class TensorFact(Section):
    shape: list[int]
    """The whole tensor's."""
    dtype: str
    part: list[int] | None = None
    """[first, count] of its elements, flattened, when the file holds these alone."""


class FileFact(Section):
    bytes: int
    sha256: str
    tensors: dict[str, TensorFact]


class _Document(Meta):
    """``checkpoint.json``."""

    format_version: int
    digest: str
    """sha256 of this file with zeros in the place of the digest."""
    files: dict[str, FileFact] = Field(default_factory=dict)


def write_part(
    folder: Path, kind: str, slices: Slices, rank: int, ranks: int
) -> dict[str, FileFact]:
    """One rank's tensors of a kind into a file of a folder, flushed to disk: {name: fact}, empty when there are none.

    Raises OSError or SafetensorError when it cannot be written.
    """
    if not slices:
        return {}
    name = (
        f"{kind}.safetensors" if ranks == 1 else f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    )
    file = folder / name
    save_file({key: part.values.to("cpu").contiguous() for key, part in slices.items()}, file)
    file.chmod(
        folder.stat().st_mode & 0o666
    )  # safetensors lets nobody else read it, whatever the umask
    fsync(file)
    tensors = {
        key: TensorFact(
            shape=list(part.shape),
            dtype=str(part.values.dtype).removeprefix("torch."),
            part=None if part.whole else [part.start, part.values.numel()],
        )
        for key, part in slices.items()
    }
    return {name: FileFact(bytes=file.stat().st_size, sha256=sha256_file(file), tensors=tensors)}


def write_document(folder: Path, meta: Meta, files: dict[str, FileFact]) -> None:
    """``checkpoint.json``, which makes a folder of files a checkpoint; flushed to disk, and the folder too."""
    document = _Document(
        **dict(meta), format_version=FORMAT_VERSION, digest=_NO_DIGEST, files=files
    )
    text = document.model_dump_json(indent=1) + "\n"
    file = folder / "checkpoint.json"
    file.write_text(text.replace(_NO_DIGEST, _digest(text), 1))
    fsync(file)
    fsync(folder)


class Folder:
    """A checkpoint folder, open for reading. Its tensors are read from the disk when asked for."""

    def __init__(self, path: Path) -> None:
        """InputError when ``checkpoint.json`` is missing, damaged, of another format version or does not name every
        element of its tensors."""
        self.path = path
        document = _read_document(path / "checkpoint.json")
        self.meta = Meta(
            **{name: getattr(document, name) for name in Meta.model_fields}
        ).model_copy(update={"config": renew_config(document.config)})
        self.files = document.files
        self._open = cache(self._open_file)
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file, fact in self.files.items():
            for name, tensor in fact.tensors.items():
                shape = tuple(tensor.shape)
                self._shapes.setdefault(kind_of(file), {})[name] = shape
                first, count = tensor.part or (0, math.prod(shape))
                self._places.setdefault((kind_of(file), name), []).append((first, count, file))
        for (kind, name), places in self._places.items():
            self._check_cover(kind, name, places)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.meta.step

    def kinds(self) -> list[str]:
        return list(self._shapes)

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Whole tensors of a kind. InputError when the checkpoint has none."""
        if kind not in self._shapes:
            raise InputError(f"{self.path}: holds no {kind}.safetensors")
        return self._shapes[kind]

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Elements of a tensor, flat: ``count`` of them (none: all to the end) from number ``start``."""
        end = math.prod(self.shapes(kind)[name]) if count is None else start + count
        parts = []
        for first, held, file in self._places[kind, name]:
            begin, stop = max(start, first), min(end, first + held)
            if begin < stop or not held:
                parts.append(self._elements(file, name, begin - first, stop - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """All of a kind, whole."""
        return {
            name: self.read(kind, name).view(shape) for name, shape in self.shapes(kind).items()
        }

    def damages(self, kinds: list[str] | None = None, rank: int = 0, ranks: int = 1) -> list[str]:
        """What is wrong with its files (of these kinds; by default all), told file by file; many ranks share the work."""
        found = []
        for name in sorted(self.files)[rank::ranks]:
            if kinds is not None and kind_of(name) not in kinds:
                continue
            file, fact = self.path / name, self.files[name]
            try:
                size = file.stat().st_size
                if size != fact.bytes:
                    found.append(
                        f"{file}: damaged: it has {size} bytes, and {fact.bytes} were saved"
                    )
                elif sha256_file(file) != fact.sha256:
                    found.append(f"{file}: damaged: its bytes are not those that were saved")
            except OSError as error:
                found.append(f"{file}: missing or unreadable: {error.strerror or error}")
        return found

    def _check_cover(self, kind: str, name: str, places: list[tuple[int, int, str]]) -> None:
        places.sort()
        ends = [0, *(first + count for first, count, _ in places)]
        if [first for first, _, _ in places] != ends[:-1] or ends[-1] != math.prod(
            self._shapes[kind][name]
        ):
            raise InputError(
                f"{self.path}: damaged: its files do not hold all of {kind} {name}, or some of it twice"
            )

    def _elements(self, file: str, name: str, begin: int, stop: int) -> Tensor:
        """Elements begin … stop − 1 of what a file holds, flat; only the rows that they lie in are read."""
        try:
            stored = self._open(file).get_slice(name)
            shape = stored.get_shape()
            if not shape or not math.prod(shape):
                return self._open(file).get_tensor(name).reshape(-1)
            row = math.prod(shape[1:])
            top = begin // row
            return stored[top : -(-stop // row)].reshape(-1)[begin - top * row : stop - top * row]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path / file}: missing or damaged: {error}") from None

    def _open_file(self, file: str) -> Any:
        return safe_open(self.path / file, framework="pt")


def kind_of(file: str) -> str:
    """'ema-00001-of-00002.safetensors' → 'ema'."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _read_document(file: Path) -> _Document:
    try:
        text = file.read_text()
        content = json.loads(text)
        version = content.get("format_version")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{file}: missing or damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{file}: format_version {version!r}; this version of r2id reads {FORMAT_VERSION}"
        )
    digest = content.get("digest")
    if not isinstance(digest, str) or _digest(text.replace(digest, _NO_DIGEST, 1)) != digest:
        raise InputError(f"{file}: damaged: it is not what was saved")
    try:
        return _Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
