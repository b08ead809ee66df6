"""Checkpoints: folders of safetensors and JSON, complete or absent, that any engine at any world size goes on from.

    RUN/checkpoints/step-00001000/checkpoint.json        what it is, and a hash of every tensor
                                 /model.safetensors      weights          float32, by the model's own names
                                 /ema.safetensors        their average
                                 /optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME
                                 /stats.safetensors      RIAE only: mean and std of its latents
    RUN/checkpoints/latest                               name of the newest, for people and other programs

A folder is written under a temporary name, flushed to disk and renamed, so that one that exists is whole. Nothing is
pickled: reading a checkpoint runs no code from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from r2id.config import Section
from r2id.errors import InputError, WorkError
from r2id.training.engine import Engine
from r2id.training.state import EngineState, Tensors

FORMAT_VERSION = 1
_TEMPORARY = ".tmp-"

Kind = Literal["model", "ema", "optimizer", "stats"]


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


class _TensorFact(Section):
    shape: list[int]
    dtype: str
    sha256: str


class _Document(Meta):
    """``checkpoint.json``."""

    format_version: int
    files: dict[str, dict[str, _TensorFact]] = Field(default_factory=dict)
    """File name → tensor name → fact."""


def save(run_dir: Path, state: EngineState, meta: Meta, keep: int, stats: Tensors | None = None) -> Path:
    """Write a checkpoint of a run, then remove all but the newest ``keep``; the folder written.

    To be called by one process. Raises WorkError when the disk is full or fails; older checkpoints are then untouched.
    """
    if state.step != meta.step:
        raise ValueError(f"state of step {state.step}, meta of step {meta.step}")
    moments = {f"{moment}.{name}": value for moment in ("exp_avg", "exp_avg_sq")
               for name, value in getattr(state, moment).items()}
    parts = {"model": state.model, "ema": state.ema, "optimizer": moments} | ({"stats": stats} if stats else {})
    root = run_dir / "checkpoints"
    folder = root / f"step-{meta.step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary = root / f"{_TEMPORARY}{folder.name}"
        _write(temporary, parts, meta)
        _replace(temporary, folder)
        _point(root, folder)
        for old in _complete(root)[:-keep]:
            _remove(old)
    except (OSError, SafetensorError) as error:
        raise WorkError(f"{folder}: not written: {error}; older checkpoints are as they were") from error
    return folder


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run directory, if there is one."""
    found = _complete(run_dir / "checkpoints")
    return found[-1] if found else None


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest in a run or ``checkpoints`` directory.

    Raises InputError when there is none.
    """
    if (path / "checkpoint.json").is_file():
        return path
    found = _complete(path / "checkpoints") or _complete(path)
    if not found:
        raise InputError(f"{path}: no checkpoint here; must be a checkpoint folder or a run directory that holds one"
                         if path.is_dir() else f"{path}: no such folder; must be a checkpoint or a run directory")
    return found[-1]


def load_meta(path: Path) -> Meta:
    """What the checkpoint at a path is. InputError when it is none, is damaged or has another format version."""
    document = _document(resolve(path))
    return Meta(**{name: getattr(document, name) for name in Meta.model_fields})


def load_tensors(path: Path, kind: Kind) -> Tensors:
    """One part of a checkpoint, every tensor checked against its hash. InputError naming what is missing or damaged."""
    folder = resolve(path)
    file = folder / f"{kind}.safetensors"
    facts = _document(folder).files.get(file.name)
    if facts is None:
        raise InputError(f"{folder}: holds no {file.name}")
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{file}: missing or damaged: {error}") from None
    wrong = set(facts) ^ set(tensors) or {name for name, fact in facts.items() if _fact(tensors[name]) != fact}
    if wrong:
        raise InputError(f"{file}: damaged: {min(wrong)} is not what was saved; remove {folder} to use the one before")
    return tensors


def load_into(engine: Engine, path: Path) -> None:
    """Let an engine go on from a checkpoint; every rank reads it. InputError when it is damaged or another model's."""
    folder = resolve(path)
    moments = load_tensors(folder, "optimizer")
    first, second = ({name.removeprefix(prefix): value for name, value in moments.items() if name.startswith(prefix)}
                     for prefix in ("exp_avg.", "exp_avg_sq."))
    engine.load_state(EngineState(load_tensors(folder, "model"), load_tensors(folder, "ema"), first, second,
                                  load_meta(folder).step))


def fit(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load weights of a checkpoint at ``path`` into a model, all of them. InputError when they are another model's."""
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: its weights do not fit the model: {reason}") from None


def identity(path: Path) -> str:
    """Identity of a checkpoint: sha256 of its description, which holds the hashes of all tensors."""
    return hashlib.sha256((resolve(path) / "checkpoint.json").read_bytes()).hexdigest()


def _document(folder: Path) -> _Document:
    file = folder / "checkpoint.json"
    try:
        text = file.read_text()
        version = json.loads(text).get("format_version")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{file}: missing or damaged: {error}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{file}: format_version {version!r}; this version of r2id reads {FORMAT_VERSION}")
    try:
        return _Document.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{file}: damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _fact(tensor: Tensor) -> _TensorFact:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return _TensorFact(shape=list(tensor.shape), dtype=str(tensor.dtype).removeprefix("torch."),
                       sha256=hashlib.sha256(data).hexdigest())


def _write(folder: Path, parts: dict[str, Tensors], meta: Meta) -> None:
    """All files of a checkpoint into a new folder, flushed to disk."""
    folder.mkdir()
    files = {}
    for kind, tensors in parts.items():
        file = folder / f"{kind}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        _flush(file)
        files[file.name] = {name: _fact(tensor) for name, tensor in tensors.items()}
    document = _Document(**dict(meta), format_version=FORMAT_VERSION, files=files)
    _write_text(folder / "checkpoint.json", document.model_dump_json(indent=1) + "\n")
    _flush(folder)


def _replace(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; one of the same step, from a run that was set back, gives way."""
    if folder.exists():
        _remove(folder)
    temporary.rename(folder)
    _flush(folder.parent)


def _point(root: Path, folder: Path) -> None:
    """``latest`` names the folder, from one moment to the next."""
    temporary = root / f"{_TEMPORARY}latest"
    _write_text(temporary, folder.name + "\n")
    temporary.replace(root / "latest")
    _flush(root)


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that, when interrupted, none is left half removed under its name."""
    doomed = folder.rename(folder.parent / f"{_TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed)


def _sweep(root: Path) -> None:
    """Remove what an interrupted save left."""
    for left in root.glob(f"{_TEMPORARY}*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def _complete(root: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(folder for folder in root.glob("step-*") if (folder / "checkpoint.json").is_file())


def _write_text(file: Path, text: str) -> None:
    file.write_text(text)
    _flush(file)


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's list of names, survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
