"""What a checkpoint is, in figures, and its averaged weights in one file."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id.checkpoints import checkpoint
from r2id.checkpoints.averages import Profile, reconstruction, widths
from r2id.checkpoints.files import Folder, kind_of
from r2id.checkpoints.pretrained import About, pack
from r2id.checkpoints.state import MOMENTS
from r2id.config import TrainConfig
from r2id.errors import InputError
from r2id.files import write_atomic

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def describe(path: Path) -> dict[str, Any]:
    """Figures of the checkpoint at a path, without reading its tensors. InputError when it is none or is damaged."""
    folder = checkpoint.resolve(path)
    checkpoint.load_meta(folder)
    opened = Folder(folder)
    meta, config = opened.meta, opened.meta.config
    sizes: dict[str, int] = defaultdict(int)
    for name, fact in opened.files.items():
        sizes[kind_of(name)] += fact.bytes
    moments = opened.shapes("optimizer" if "optimizer" in opened.kinds() else "ema")
    parameters = sum(
        math.prod(shape) for name, shape in moments.items() if not name.startswith(f"{MOMENTS[1]}.")
    )
    return {
        "checkpoint": str(folder),
        "stage": meta.stage,
        "step": meta.step,
        "steps": config["train"]["steps"],
        "samples": meta.samples,
        "seed": meta.seed,
        "parameters": parameters,
        "averages": widths(_train(opened)) or {"ema": config["train"]["ema"]},
        "snapshots": len(_snapshots(opened)),
        "model": config[meta.stage],
        "facts": meta.model,
        "data": config["data"]["shards"],
        "codec": config.get("codec"),
        "bytes": dict(sizes),
        "total_bytes": sum(sizes.values()),
        "written_by": max(sum(kind_of(name) == kind for name in opened.files) for kind in sizes),
        "identity": checkpoint.identity(folder),
    }


def export(
    path: Path,
    out: Path,
    *,
    dtype: str = "float32",
    sigma: float | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the averaged weights of the checkpoint at a path into one safetensors file; see r2id.checkpoints.pretrained.

    ``sigma``: width σ_rel of the average, reconstructed from the run's snapshots; none is the one that sampling uses.
    Returns the file, its size, and how well the average was fitted. InputError when the checkpoint is none, is damaged, or
    does not allow for that; WorkError when the disk is full.
    """
    if out.suffix != ".safetensors":
        raise InputError(f"{out}: must be a .safetensors file")
    if out.exists() and not overwrite:
        raise InputError(f"{out}: exists already; choose another, or --overwrite")
    folder = checkpoint.resolve(path)
    weights = checkpoint.load_tensors(folder, "ema")
    opened = Folder(folder)
    statistics = (
        checkpoint.load_tensors(folder, "stats")
        if "stats" in opened.kinds() and sigma is None
        else None
    )
    fitted: dict[str, Any] = {"average": "default"}
    if sigma is not None:
        weights, fitted = _reconstruct(opened, weights, sigma)
    meta = opened.meta
    about = About(
        meta.stage,
        meta.step,
        meta.samples,
        fitted["average"],
        meta.config,
        meta.model,
        {name: value.tolist() for name, value in statistics.items()} if statistics else None,
    )
    content = pack(about, {name: _converted(name, value, dtype) for name, value in weights.items()})
    write_atomic(out, content)
    return {
        "file": str(out),
        "bytes": len(content),
        "dtype": dtype,
        "stage": meta.stage,
        "step": meta.step,
        **fitted,
        "statistics": statistics is not None,
    }


def _reconstruct(
    opened: Folder, weights: dict[str, Tensor], sigma: float
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The average of a width, by the model's names, and how it was fitted."""
    if not 0 < sigma < 0.28:
        raise InputError(f"--ema {sigma}: must be default, or a width above 0 and below 0.28")
    kinds = widths(_train(opened))
    if not kinds:
        raise InputError(
            f"--ema {sigma}: {opened.path} has one average, of decay {_train(opened).ema}; train with "
            "train.ema_profiles to choose the width later, or export --ema default"
        )
    store: list[tuple[Profile, Folder, str]] = [
        ((width, float(snapshot.step)), snapshot, kind)
        for snapshot in [*_snapshots(opened), opened]
        for kind, width in kinds.items()
    ]
    coefficients, misfit = reconstruction(
        [profile for profile, _, _ in store], (sigma, float(opened.step))
    )
    averaged = {name.removeprefix(f"{MOMENTS[0]}.") for name in opened.shapes("optimizer")} & set(
        weights
    )
    sums = {name: torch.zeros_like(weights[name], dtype=torch.float64) for name in averaged}
    for coefficient, (_, snapshot, kind) in zip(coefficients, store, strict=True):
        damages = snapshot.damages([kind])
        if damages:
            raise InputError(f"{damages[0]}; remove {snapshot.path} to do without it")
        for name, value in sums.items():
            value.add_(snapshot.read(kind, name).view(value.shape).double(), alpha=coefficient)
    return (
        {name: sums[name].float() if name in sums else value for name, value in weights.items()},
        {"average": str(sigma), "snapshots": len(store), "misfit": misfit},
    )


def _snapshots(opened: Folder) -> list[Folder]:
    """The averages that the checkpoint's run has stored before it."""
    root = opened.path.parent.parent / "ema"
    return [
        Folder(folder)
        for folder in checkpoint.complete(root)
        if checkpoint.step_of(folder) < opened.step
    ]


def _train(opened: Folder) -> TrainConfig:
    return TrainConfig.model_validate(opened.meta.config["train"])


def _converted(name: str, value: Tensor, dtype: str) -> Tensor:
    if not value.is_floating_point():
        return value.contiguous()
    converted = value.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(converted).all() and torch.isfinite(value).all():
        raise InputError(
            f"--dtype {dtype}: {name} has values beyond its range; use bfloat16 or float32"
        )
    return converted
