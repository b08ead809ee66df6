"""A trained model as inference reads it: a checkpoint, or an exported one, here or on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from r2id.checkpoints import hub, pretrained
from r2id.checkpoints.files import DESCRIPTION, LATEST
from r2id.checkpoints.pretrained import About, Pretrained
from r2id.checkpoints.reading import Checkpoint, list_checkpoints
from r2id.checkpoints.state import Tensors
from r2id.config import Section
from r2id.errors import InputError

S = TypeVar("S", bound=Section)

Trained = Checkpoint | Pretrained
"""Both have path, identity, meta, load_ema(model), statistics(), and, for an R2ID, codec() and
guide()."""

_FOR_RIAE = (
    ": an RIAE draws nothing by itself; r2id reconstruct takes it, and in Python "
    "r2id.models.riae.RIAE.from_pretrained"
)


def open_trained(source: Trained | Path | str, stage: str | None = None) -> Trained:
    """Open a checkpoint, the newest one of a run directory, or an exported file or its folder.

    A name such as ``owner/name`` that is no path here is a model of the Hugging Face Hub, which is
    fetched; see r2id.checkpoints.hub.

    In a folder of several exported files, it is the only one of ``stage``. An exported R2ID is both
    models: as one of stage "riae" it is its RIAE. Raises InputError when there is no such model,
    when it is damaged, and when it is of another stage.
    """
    if isinstance(source, Path | str):
        opened = _open(Path(source), stage)
    elif isinstance(source, Checkpoint | Pretrained):
        opened = source
    else:
        raise InputError(f"model {source!r}: must be a path, or a name of the hub")
    if stage == "riae" and isinstance(opened, Pretrained) and opened.inner:
        return opened.inner
    if stage not in (None, opened.meta.stage):
        raise InputError(
            f"{opened.path}: a model of stage {opened.meta.stage!r}, not {stage!r}"
            + (_FOR_RIAE if opened.meta.stage == "riae" else "")
        )
    return opened


def read_section(trained: Trained, name: str, schema: type[S]) -> S:
    """Return a section of a model's training config. Raises InputError when it cannot be read."""
    try:
        return schema.model_validate(trained.meta.config[name])
    except (KeyError, ValidationError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{trained.path}: config of {name} is not of this version of r2id: {reason}"
        ) from None


def about(trained: Trained) -> About:
    """Return the metadata of an exported file that holds a model exactly as it is."""
    meta, statistics = trained.meta, trained.statistics()
    measured = {name: value.tolist() for name, value in (statistics or {}).items()} or None
    average = trained.about.average if isinstance(trained, Pretrained) else "default"
    return About(
        meta.stage,
        meta.step,
        meta.samples,
        average,
        meta.config,
        meta.model,
        measured,
        trained.identity,
    )


def weights(trained: Trained) -> Tensors:
    """Read the averaged weights of a model."""
    return trained.weights if isinstance(trained, Pretrained) else trained.tensors("ema")


def _open(path: Path, stage: str | None) -> Trained:
    if hub.is_hub_name(str(path)):
        path = hub.fetch(str(path))
    if path.name == LATEST and path.is_file():
        return Checkpoint.open(path)
    if path.is_file():
        return pretrained.read(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such folder or file; must be a run directory, a checkpoint or an exported "
            "model"
        )
    if (path / DESCRIPTION).is_file() or list_checkpoints(path / "checkpoints"):
        return Checkpoint.open(path)
    stages = {file: pretrained.stage_of(file) for file in sorted(path.glob("*.safetensors"))}
    exported = [file for file, found in stages.items() if found]
    wanted = [file for file in exported if stages[file] == stage] or exported
    if len(wanted) > 1:
        raise InputError(
            f"{path}: holds several exported models, {', '.join(file.name for file in wanted)}: "
            "name one of them"
        )
    return pretrained.read(wanted[0]) if wanted else Checkpoint.open(path)
