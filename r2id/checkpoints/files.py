"""The format of a checkpoint folder: ``checkpoint.json`` and the safetensors files that it names.

``checkpoint.json`` holds the hashes of all files and of itself, so that damage is always noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from safetensors.torch import save_file

from r2id.checkpoints.state import Slices
from r2id.config import Section
from r2id.config.renamed import renew_config
from r2id.errors import InputError
from r2id.files import fsync, sha256_file

FORMAT_VERSION = 2
DESCRIPTION = "checkpoint.json"
LATEST = "latest"
"""File beside checkpoints that names the newest."""
CODEC = "codec.safetensors"
"""The RIAE of an R2ID, as an exported model."""

_NO_DIGEST = "0" * 64


class Meta(Section):
    """Metadata of a checkpoint."""

    stage: str
    step: int
    """Optimizer steps done.

    Data order and random streams are keyed by step, so that their positions need not be stored.
    """
    samples: int
    """Training samples seen."""
    seed: int
    config: dict[str, Any]
    """The whole resolved config of the run."""
    model: dict[str, Any]
    """Facts that are needed, beside the config, to build and use the model."""


class TensorFact(Section):
    """Describes a tensor, or a part of one, in a file."""

    shape: list[int]
    """Shape of the whole tensor."""
    dtype: str
    part: list[int] | None = None
    """[first, count] of its flattened elements, when the file does not hold all of them."""


class FileFact(Section):
    """Describes a safetensors file of a checkpoint."""

    bytes: int
    sha256: str
    tensors: dict[str, TensorFact]


class Description(Meta):
    """The content of ``checkpoint.json``."""

    format_version: int
    digest: str
    """sha256 of this file, with zeros in place of the digest itself."""
    files: dict[str, FileFact] = Field(default_factory=dict)

    def meta(self, folder: Path) -> Meta:
        """Return the metadata without the files, with settings under their current names.

        Raises InputError, which names the folder, for settings that no model has any more.
        """
        facts = {name: getattr(self, name) for name in Meta.model_fields}
        return Meta(**facts | {"config": renew_config(self.config, stored_in=folder)})


def write_part(
    folder: Path, kind: str, slices: Slices, rank: int, ranks: int
) -> dict[str, FileFact]:
    """Write one rank's tensors of a kind into a file, and flush it to disk.

    Returns {file name: facts}, which is empty when the rank holds no such tensors. Raises OSError
    or SafetensorError when the file cannot be written.
    """
    if not slices:
        return {}
    name = (
        f"{kind}.safetensors" if ranks == 1 else f"{kind}-{rank + 1:05d}-of-{ranks:05d}.safetensors"
    )
    file = folder / name
    save_file({key: part.values.to("cpu").contiguous() for key, part in slices.items()}, file)
    # safetensors ignores the umask and makes files that only their owner can read.
    file.chmod(folder.stat().st_mode & 0o666)
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


def write_whole(folder: Path, name: str, content: bytes) -> dict[str, FileFact]:
    """Write a file whose tensors are no state of the run, and flush it → {file name: facts}."""
    file = folder / name
    file.write_bytes(content)
    fsync(file)
    return {name: FileFact(bytes=len(content), sha256=sha256_file(file), tensors={})}


def write_description(folder: Path, meta: Meta, files: dict[str, FileFact]) -> None:
    """Write ``checkpoint.json``, which turns the folder into a checkpoint; flush both to disk."""
    description = Description(
        **dict(meta), format_version=FORMAT_VERSION, digest=_NO_DIGEST, files=files
    )
    text = description.model_dump_json(indent=1) + "\n"
    file = folder / DESCRIPTION
    file.write_text(text.replace(_NO_DIGEST, _digest(text), 1), encoding="utf-8")
    fsync(file)
    fsync(folder)


def read_description(folder: Path) -> tuple[Description, str]:
    """Read the ``checkpoint.json`` of a folder → (its content, sha256 of the file).

    Raises InputError when it is missing, damaged or of another format version.
    """
    file = folder / DESCRIPTION
    try:
        raw = file.read_bytes()
        text = raw.decode()
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
        raise InputError(f"{file}: damaged: its content is not what was saved")
    try:
        return Description.model_validate_json(text), hashlib.sha256(raw).hexdigest()
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None


def kind_of(file: str) -> str:
    """Return the kind of tensors in a file: 'ema-00001-of-00002.safetensors' → 'ema'."""
    return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors$", "", file)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
