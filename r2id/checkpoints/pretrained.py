"""A trained model in one file: averaged weights as safetensors, and metadata to build the model.

The metadata are texts by name. Three are plain: ``format`` (r2id-model), ``format_version``, and
``sha256`` of the rest of the content. The others are JSON: ``stage``, ``step``, ``samples``,
``average`` (which average of the weights it is), ``config`` (of the whole run), ``facts`` (what
else is needed to build the model), ``statistics`` (mean and standard deviation of an RIAE's
latents, per channel), and ``identity`` (that of the checkpoint, where the file is the same model).

The file of an R2ID of latents holds its RIAE too: format version 2, with the RIAE's metadata as
``codec``, and its tensors under names that begin with ``codec.``. With a guide, whose tensors'
names begin with ``guide.``, the format version is 3.

``r2id checkpoint export`` writes such a file; whatever takes a trained model reads it, see
r2id.checkpoints.trained. Checkpoints of an R2ID hold its RIAE as such a file. Reading it
runs no code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from r2id.checkpoints.files import Meta
from r2id.checkpoints.state import Tensors
from r2id.config.renamed import renew_config
from r2id.errors import InputError

FORMAT = "r2id-model"
VERSIONS = ("1", "2", "3")
"""Format versions of files: of one model, of an R2ID with its RIAE, and with a guide."""
_CODEC, _GUIDE = "codec.", "guide."


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
    identity: str | None = None
    """Checkpoint.identity of what was exported, or of it and its guide; None when the weights are
    not exactly those."""
    guide: dict[str, Any] | None = None
    """{"step": …, "identity": …} of a guide that the run did not keep itself."""


@dataclass(frozen=True)
class Pretrained:
    """The content of a file."""

    path: Path
    version: str
    """Format version of the file."""
    about: About
    weights: dict[str, Tensor]
    identity: str
    """That of the checkpoint which this is, or else the hash of the content."""
    inner: Pretrained | None = None
    """The RIAE of an R2ID."""
    guide_weights: dict[str, Tensor] | None = None
    """Those of the guide of an R2ID."""

    @property
    def meta(self) -> Meta:
        """The metadata, as of a checkpoint."""
        about = self.about
        return Meta(
            stage=about.stage,
            step=about.step,
            samples=about.samples,
            seed=about.config["seed"],
            config=about.config,
            model=about.facts,
        )

    def statistics(self) -> Tensors | None:
        """Return mean and std of an RIAE's latents, float32 [L]; None where they are not known."""
        known = self.about.statistics
        if known is None:
            return None
        return {name: torch.tensor(values, dtype=torch.float32) for name, values in known.items()}

    def guide(self) -> Tensors | None:
        """Return the weights of an R2ID's guide; None when it has none."""
        return self.guide_weights

    def codec(self) -> Pretrained:
        """Return the RIAE of an R2ID. Raises InputError when the file was written without it."""
        if self.inner is None:
            raise InputError(
                f"{self.path}: was exported without its RIAE, so that it cannot draw; export it "
                "again from its checkpoint"
            )
        return self.inner

    def load_ema(self, model: nn.Module) -> None:
        """Load the weights into a model. Raises InputError when they belong to another model."""
        try:
            model.float().load_state_dict(self.weights)
        except RuntimeError as error:
            raise InputError(
                f"{self.path}: its weights do not fit the model: {' '.join(str(error).split())}"
            ) from None


def pack(
    about: About,
    weights: dict[str, Tensor],
    codec: tuple[About, dict[str, Tensor]] | None = None,
    guide: dict[str, Tensor] | None = None,
) -> bytes:
    """Return the bytes of a file with this content.

    ``codec`` is the RIAE of an R2ID, and ``guide`` the weights of its guide.
    """
    metadata = {name: json.dumps(value) for name, value in asdict(about).items()}
    version = VERSIONS[0]
    if codec is not None:
        metadata["codec"], version = json.dumps(asdict(codec[0])), VERSIONS[1]
        weights = weights | {_CODEC + name: value for name, value in codec[1].items()}
    if guide is not None:
        version = VERSIONS[2]
        weights = weights | {_GUIDE + name: value for name, value in guide.items()}
    metadata |= {"format": FORMAT, "format_version": version}
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
    version = metadata.get("format_version")
    if version not in VERSIONS:
        raise InputError(
            f"{path}: format_version {version}; this version of r2id reads {', '.join(VERSIONS)}"
        )
    stored = metadata.pop("sha256", None)
    if stored != _digest(metadata, weights):
        raise InputError(f"{path}: damaged: its content is not what was exported")
    content = {name: json.loads(text) for name, text in metadata.items() if name != "format"}
    found = _unpack(path, version, content, weights, stored)
    if stage not in (None, found.about.stage):
        raise InputError(f"{path}: a model of stage {found.about.stage!r}, not {stage!r}")
    return found


def stage_of(path: Path) -> str | None:
    """Tell the stage of an exported model without reading its weights; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return json.loads(metadata["stage"]) if metadata.get("format") == FORMAT else None
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError):
        return None


def _unpack(
    path: Path, version: str, content: Mapping[str, Any], weights: dict[str, Tensor], digest: str
) -> Pretrained:
    """Make the model of a file's metadata and weights, with the RIAE among them if there is one."""
    known = {name: content[name] for name in About.__dataclass_fields__ if name in content}
    about = About(**known | {"config": renew_config(known["config"], stored_in=path)})
    inner = None
    if content.get("codec"):
        inner = _unpack(path, version, content["codec"], _taken(weights, _CODEC), digest)
    guide = _taken(weights, _GUIDE) or None
    return Pretrained(path, version, about, weights, about.identity or digest, inner, guide)


def _taken(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Take the tensors of a prefix out of the weights, and return them by the rest of the name."""
    names = [name for name in weights if name.startswith(prefix)]
    return {name.removeprefix(prefix): weights.pop(name) for name in names}


def _digest(metadata: dict[str, str], weights: dict[str, Tensor]) -> str:
    """Compute the sha256 of metadata and weights, whatever their order in the file."""
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
