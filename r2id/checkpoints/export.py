"""Describing a checkpoint, and exporting its averaged weights as one file."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id.checkpoints.averages import Profile, reconstruction, widths
from r2id.checkpoints.files import kind_of
from r2id.checkpoints.pretrained import About, pack
from r2id.checkpoints.reading import Checkpoint, list_checkpoints
from r2id.checkpoints.state import MOMENTS, Tensors
from r2id.checkpoints.trained import Trained, about, open_trained, read_section, weights
from r2id.config import (
    DiffusionConfig,
    R2idConfig,
    SampleConfig,
    TrainConfig,
    change,
    check_guidance,
)
from r2id.errors import InputError
from r2id.files import step_of, write_atomic
from r2id.progress import say

_OF_DATA = ("codec", "digest", "image", "areas", "ratios")
"""Facts in which a model and its guide may differ: the RIAE's place, and what was trained on."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def describe(source: Checkpoint | Path) -> dict[str, Any]:
    """Describe a checkpoint without reading its tensors. Raises errors like Checkpoint.open."""
    checkpoint = Checkpoint.open(source)
    meta, config = checkpoint.meta, checkpoint.meta.config
    sizes: dict[str, int] = defaultdict(int)
    for name, fact in checkpoint.files.items():
        sizes[kind_of(name)] += fact.bytes
    # Parameters are counted by their moments, because the weights' file also holds buffers. Those
    # of a discriminator are the loss's, not the model's.
    # Snapshots have no optimizer.
    moments = checkpoint.shapes("optimizer" if "optimizer" in checkpoint.kinds() else "ema")
    parameters = sum(
        math.prod(shape)
        for name, shape in moments.items()
        if not name.startswith((f"{MOMENTS[1]}.", f"{MOMENTS[0]}.discriminator."))
    )
    averages = widths(_train(checkpoint))
    return {
        "checkpoint": str(checkpoint.path),
        "stage": meta.stage,
        "step": meta.step,
        "steps": config["train"]["steps"],
        "samples": meta.samples,
        "seed": meta.seed,
        "parameters": parameters,
        "averages": averages or {"ema": config["train"]["ema"]},
        "averages_by": "width" if averages else "decay",
        "snapshots": len(_snapshots(checkpoint)),
        "model": config[meta.stage],
        "facts": meta.model,
        "data": config["data"]["shards"],
        "codec": config.get("codec"),
        "bytes": dict(sizes),
        "total_bytes": sum(sizes.values()),
        "written_by": max(
            sum(kind_of(name) == kind for name in checkpoint.files) for kind in sizes
        ),
        "identity": checkpoint.identity,
    }


def export(
    source: Checkpoint | Path,
    out: Path,
    *,
    dtype: str = "float32",
    sigma: float | None = None,
    shift_exponent: float | None = None,
    guide: Trained | Path | None = None,
    riae: Trained | None = None,
    defaults: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    publish: bool = False,
) -> dict[str, Any]:
    """Write the averaged weights of a checkpoint into one file; see r2id.checkpoints.pretrained.

    ``sigma`` is the width σ_rel of an average to be reconstructed from the run's snapshots; None is
    the average that sampling uses. ``shift_exponent`` replaces an R2ID's trained noise shift. The
    RIAE and the guide of an R2ID go into the file too; ``guide`` is a model whose averaged weights
    take the place of the run's own; ``riae`` takes the place of its RIAE, and has its encoder, as
    what r2id.models.codec.open_finetuned_riae returns; ``defaults`` are settings of SamplerConfig
    that samples have by default from then on. With ``publish``, the configs in it do not tell where
    files were, but only their names. Returns the file, its size, how well the average was fitted,
    and the identity that a report of the model has unless its weights are rounded.
    Raises InputError when there is no checkpoint, or it is damaged or has no such average, or the
    guide is of another kind, and WorkError when the disk is full.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: must be a .safetensors file")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another, or --overwrite")
    checkpoint = Checkpoint.open(source)
    averaged, described = weights(checkpoint), about(checkpoint)
    fitted: dict[str, Any] = {"average": "default"}
    if sigma is not None:
        averaged, fitted = _reconstruct(checkpoint, averaged, sigma)
        # Latent statistics were measured with the default average, and hold for no other.
        described = replace(described, average=fitted["average"], statistics=None, identity=None)
    if shift_exponent is not None:
        diffusion = {**described.config["diffusion"], "shift_exponent": shift_exponent}
        described = replace(described, config={**described.config, "diffusion": diffusion})
    identity, early = checkpoint.identity, checkpoint.guide()
    if guide is not None:
        other = _open_guide(checkpoint, guide)
        early = weights(other)
        identity = _combined(identity, "guided", other)
        about_guide = {"step": other.meta.step, "identity": other.identity}
        described = replace(described, guide=about_guide, identity=described.identity and identity)
    codec = _codec_of(checkpoint, riae)
    if riae is not None:
        identity = _combined(identity, "decoded", riae)
        described = replace(described, identity=described.identity and identity)
    if defaults:
        _check_defaults(checkpoint, defaults, guided=early is not None)
        sample = change(read_section(checkpoint, "sample", SampleConfig), defaults)
        config = {**described.config, "sample": sample.model_dump(mode="json")}
        described = replace(described, config=config)

    def converted(tensors: Tensors) -> Tensors:
        return {name: _converted(name, value, dtype) for name, value in tensors.items()}

    if dtype != "float32":  # rounded weights are another model
        described = replace(described, identity=None)
        codec = codec and (replace(codec[0], identity=None), codec[1])
    if publish:
        described = _without_places(described)
        codec = codec and (_without_places(codec[0]), codec[1])
    codec = codec and (codec[0], converted(codec[1]))
    content = pack(described, converted(averaged), codec, early and converted(early))
    write_atomic(out, content)
    return {
        "file": str(out),
        "bytes": len(content),
        "dtype": dtype,
        "stage": described.stage,
        "step": described.step,
        **fitted,
        "statistics": described.statistics is not None,
        "codec": codec is not None,
        "riae": str(riae.path) if riae else None,
        "guide": described.guide,
        "identity": identity,
    }


def _combined(identity: str, how: str, other: Trained) -> str:
    """Return the identity of a model to which another one was added."""
    return hashlib.sha256(f"{identity} {how} by {other.identity}".encode()).hexdigest()


def _open_guide(checkpoint: Checkpoint, guide: Trained | Path) -> Trained:
    """Open another model that is to guide this one.

    Both predict under the same condition, from the same latents at the same noise, with networks of
    the same structure. Raises InputError when they cannot.
    """
    if checkpoint.meta.stage != "r2id":
        raise InputError(f"--guide: goes with an R2ID, and {checkpoint.path} is an RIAE")
    other = open_trained(guide, "r2id")
    wanted, found = _structure(checkpoint), _structure(other)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise InputError(
                f"--guide {other.path}: has {name} = {found.get(name)}; must have "
                f"{wanted.get(name)}, as {checkpoint.path}"
            )
    return other


def _structure(trained: Trained) -> dict[str, Any]:
    """Return the settings and facts that a model and its guide have in common."""
    network = read_section(trained, "r2id", R2idConfig).model_dump(exclude={"dropout", "jitter"})
    diffusion = read_section(trained, "diffusion", DiffusionConfig)
    facts = {name: fact for name, fact in trained.meta.model.items() if name not in _OF_DATA}
    return {
        **{f"r2id.{name}": value for name, value in network.items()},
        "diffusion.objective": diffusion.objective,
        "diffusion.schedule": diffusion.schedule,
        **facts,
    }


def _check_defaults(checkpoint: Checkpoint, defaults: Mapping[str, Any], guided: bool) -> None:
    """Raise InputError for settings that samples of the model cannot have."""
    if checkpoint.meta.stage != "r2id":
        option = min(defaults).replace("_", "-")
        raise InputError(f"--{option}: goes with an R2ID, and {checkpoint.path} is an RIAE")
    facts, names = checkpoint.meta.model, ("guidance", "autoguidance")
    conditional = bool(facts["classes"] or facts.get("embedding"))
    check_guidance(*map(defaults.get, names), conditional=conditional, guided=guided)


def _without_places(described: About) -> About:
    """Cut paths outside of the working folder, and addresses, down to their last part.

    They may hold a user's name or a key.
    """

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cut(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [cut(inner) for inner in value]
        if isinstance(value, str) and (value.startswith(("/", "~", "..")) or "://" in value):
            return Path(value.partition("?")[0]).name
        return value

    return replace(described, config=cut(described.config), facts=cut(described.facts))


def _riae_of(checkpoint: Checkpoint) -> Trained | None:
    """Open the RIAE of an R2ID of latents. None if it is lost, as it may be for old checkpoints."""
    if checkpoint.meta.stage != "r2id" or checkpoint.meta.model["codec"] is None:
        return None
    try:
        return checkpoint.codec()
    except InputError as error:
        say(f"exported without its RIAE, so that it cannot draw: {error}")
        return None


def _codec_of(checkpoint: Checkpoint, riae: Trained | None) -> tuple[About, Tensors] | None:
    """Return the RIAE that an R2ID is exported with: ``riae``, or else its own, if it has one."""
    own = _riae_of(checkpoint)
    if own is None or riae is None:
        return (about(own), weights(own)) if own else None
    # R2ID knows latents that the statistics of its own RIAE have normalised.
    described, statistics = about(riae), about(own).statistics
    if described.statistics != statistics:
        described = replace(described, statistics=statistics, identity=None)
    return described, weights(riae)


def _reconstruct(
    checkpoint: Checkpoint, default: Tensors, sigma: float
) -> tuple[Tensors, dict[str, Any]]:
    """Reconstruct the average of a width → (its weights by name, how it was fitted)."""
    if not 0 < sigma < 0.28:  # a power-function profile is narrower than 1/√12
        raise InputError(f"--ema {sigma}: must be default, or a width above 0 and below 0.28")
    train = _train(checkpoint)
    kinds = widths(train)
    if not kinds:
        raise InputError(
            f"--ema {sigma}: {checkpoint.path} has one average, of decay {train.ema}; train with "
            "train.ema_profiles to choose the width later, or export --ema default"
        )
    store: list[tuple[Profile, Checkpoint, str]] = [
        ((width, float(snapshot.step)), snapshot, kind)
        for snapshot in [*_snapshots(checkpoint), checkpoint]
        for kind, width in kinds.items()
    ]
    coefficients, misfit = reconstruction(
        [profile for profile, _, _ in store], (sigma, float(checkpoint.step))
    )
    parameters = {name.removeprefix(f"{MOMENTS[0]}.") for name in checkpoint.shapes("optimizer")}
    averaged = parameters & set(default)  # buffers are copied, not averaged
    sums = {name: torch.zeros_like(default[name], dtype=torch.float64) for name in averaged}
    # Summed in float64, because coefficients of both signs nearly cancel.
    for coefficient, (_, snapshot, kind) in zip(coefficients, store, strict=True):
        damages = snapshot.damages([kind])
        if damages:
            raise InputError(f"{damages[0]}; remove {snapshot.path} to do without it")
        for name, value in sums.items():
            value.add_(snapshot.read(kind, name).view(value.shape).double(), alpha=coefficient)
    return (
        {name: sums[name].float() if name in sums else value for name, value in default.items()},
        {"average": str(sigma), "snapshots": len(store), "misfit": misfit},
    )


def _snapshots(checkpoint: Checkpoint) -> list[Checkpoint]:
    """Open the snapshots that the checkpoint's run has made before it."""
    folders = list_checkpoints(checkpoint.run / "ema")
    return [Checkpoint(folder) for folder in folders if step_of(folder) < checkpoint.step]


def _train(checkpoint: Checkpoint) -> TrainConfig:
    return TrainConfig.model_validate(checkpoint.meta.config["train"])


def _converted(name: str, value: Tensor, dtype: str) -> Tensor:
    """Convert a float tensor. Raises InputError when a value would become infinite."""
    if not value.is_floating_point():
        return value.contiguous()
    converted = value.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(converted).all() and torch.isfinite(value).all():
        raise InputError(
            f"--dtype {dtype}: {name} has values beyond its range; use bfloat16 or float32"
        )
    return converted
