"""A trained model in one file: averaged weights as safetensors, and metadata to build the model.

The metadata are texts by name. Three are plain: ``format`` (r2id-model), ``format_version``, and
``sha256`` of the rest of the content. The others are JSON: ``stage``, ``step``, ``samples``,
``average`` (which average of the weights it is), ``config`` (of the whole run), ``facts`` (what
else is needed to build the model) and ``statistics`` (mean and standard deviation of an RIAE's
latents, per channel).

``r2id checkpoint export`` writes such a file; RIAE.from_pretrained and R2ID.from_pretrained read
it. Reading it runs no code.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from r2id.config import Section
from r2id.config.renamed import renew_config
from r2id.errors import InputError

FORMAT, FORMAT_VERSION = "r2id-model", "1"

S = TypeVar("S", bound=Section)
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class About:
    """The metadata of a file."""

    stage: str
    step: int
    samples: int
    average: str
    config: dict[str, Any]
    facts: dict[str, Any]
    statistics: dict[str, list[float]] | None
    """{"mean": …, "std": …} of the raw latents, a number per channel.

    None for an R2ID, and for any average but the default, because only its latents were measured.
    """


@dataclass(frozen=True)
class Pretrained:
    """The content of a file."""

    path: Path
    about: About
    weights: dict[str, Tensor]

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that are needed, beside the config, to build the model."""
        return self.about.facts

    def section(self, name: str, schema: type[S]) -> S:
        """Return a section of the run's config. Raises InputError when it cannot be read."""
        try:
            return schema.model_validate(self.about.config[name])
        except (KeyError, ValidationError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path}: config of {name} is not of this version of r2id: {reason}"
            ) from None

    def fill(self, model: M) -> M:
        """Load the weights into a model, and return it in evaluation mode.

        Raises InputError when they belong to another model.
        """
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: its weights do not fit the model: {' '.join(str(error).split())}"
            ) from None
        return model.eval()


def pack(about: About, weights: dict[str, Tensor]) -> bytes:
    """Return the bytes of a file with this content."""
    metadata = {name: json.dumps(value) for name, value in asdict(about).items()}
    metadata |= {"format": FORMAT, "format_version": FORMAT_VERSION}
    return save(weights, metadata | {"sha256": _digest(metadata, weights)})


def read(path: Path, stage: str | None = None) -> Pretrained:
    """Read a file. Raises InputError when it is no such file, is damaged, or of another stage."""
    if path.is_dir():
        raise InputError(
            f"{path}: is a folder; must be a file that r2id checkpoint export wrote (perhaps from "
            "this folder)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            # Copies, because the tensors are the file itself, mapped into memory, and would change
            # when someone rewrites it.
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; must be one that r2id checkpoint export wrote"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: damaged, or no safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise InputError(
            f"{path}: not a file that r2id checkpoint export wrote: its metadata has no format "
            f"{FORMAT!r}"
        )
    if metadata.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version {metadata.get('format_version')}; this version of r2id reads "
            f"{FORMAT_VERSION}"
        )
    if metadata.pop("sha256", None) != _digest(metadata, weights):
        raise InputError(f"{path}: damaged: its content is not what was exported")
    facts = {name: json.loads(metadata[name]) for name in About.__dataclass_fields__}
    about = About(**facts | {"config": renew_config(facts["config"])})
    if stage not in (None, about.stage):
        raise InputError(f"{path}: a model of stage {about.stage!r}, not {stage!r}")
    return Pretrained(path, about, weights)


def _digest(metadata: dict[str, str], weights: dict[str, Tensor]) -> str:
    """Compute the sha256 of metadata and weights, whatever their order in the file."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
