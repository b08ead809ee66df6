"""Estimating what a run writes: checkpoints, copies of the averages, and the latents it reads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from r2id.config import R2idRun, TrainConfig
from r2id.data.loader import image_sizes
from r2id.data.shards import ShardSet
from r2id.training.ema import decays, snapshot_interval
from r2id.training.engines.base import discriminator_of, trained_parameters
from r2id.training.workload import Workload

_FLOAT = 4
"""Bytes of an element: checkpoints hold float32 alone, and so do latents, unless r2id encode is
told otherwise."""


def disk(workload: Workload, shards: ShardSet | None) -> dict[str, Any]:
    """Count the bytes that a run's folder takes, and its latents.

    "checkpoints" are those that stay at the end, of "checkpoint" bytes each; while one is written
    there is one more. The size of all "latents" is known from the ``shards`` alone, and None
    without them; that of one image of the largest size is "latents_per_image".
    """
    config, train = workload.config, workload.config.train
    with torch.device("meta"):
        module = workload.module()
        codec = _size(workload.codec()) if workload.dimensions.riae is not None else 0
    model, other = _size(module.model), discriminator_of(module)
    trained = sum(parameter.numel() for parameter in trained_parameters(module).values())
    checkpoint = model * (1 + len(decays(train))) + 2 * _FLOAT * trained + codec
    snapshots = train.steps // snapshot_interval(train) if train.ema_profiles else 0
    found: dict[str, Any] = {
        "checkpoint": checkpoint + (_size(other) if other is not None else 0),
        "checkpoints": len(kept_steps(train)),
        "averages": snapshots * len(train.ema_profiles) * model,
        "latents": None,
        "latents_per_image": None,
    }
    riae = workload.dimensions.riae
    if isinstance(config, R2idRun) and riae is not None and config.data.latents is not None:
        cell = _FLOAT * riae.latent_channels * (2 if config.data.flip else 1)
        found["latents_per_image"] = cell * math.prod(workload.grid())
        if shards is not None:
            splits = (name for name, part in shards.manifest.splits.items() if part.samples)
            sizes = [size for name in splits for size in image_sizes(shards, config.data, name)]
            cells = {size: math.prod(riae.grid_for(size)) for size in set(sizes)}
            found["latents"] = cell * sum(cells[size] for size in sizes)
    return found


def kept_steps(train: TrainConfig) -> list[int]:
    """List the steps whose checkpoints a finished run keeps: the newest ones, and milestones."""
    end, milestone = train.steps + 1, train.milestone_every
    milestones = range(milestone, end, milestone) if milestone else range(0)
    saved = sorted({*range(train.save_every, end, train.save_every), *milestones, train.steps})
    return sorted({*saved[-train.keep :], *milestones})


def describe_disk(found: dict[str, Any]) -> str:
    """Describe the result of ``disk`` in a line for people."""
    latents = ""
    if found["latents"] is not None:
        latents = f", latents {found['latents'] / 1e9:.3g}"
    elif found["latents_per_image"] is not None:
        latents = f", latents up to {found['latents_per_image'] / 1e3:.3g} per million images"
    averages = f", averages {found['averages'] / 1e9:.3g}" if found["averages"] else ""
    each = f"{found['checkpoint'] / 1e9:.3g}"
    return f"disk in GB: checkpoints {found['checkpoints']} × {each}{averages}{latents}"


def _size(module: nn.Module) -> int:
    """Return the bytes of a module's weights and buffers."""
    return sum(tensor.nbytes for tensor in module.state_dict().values())
