"""What a config comes to for so many processes: each one's share of the batch, and DeepSpeed's configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.errors import InputError


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Samples per forward pass of one process. InputError when the global batch does not divide evenly."""
    share = max(1, train.batch // world_size)
    micro = min(train.micro_batch or share, share)
    unit = micro * world_size
    if train.batch % unit:
        below, above = train.batch // unit * unit, (train.batch // unit + 1) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"train.batch = {train.batch}: must be a multiple of {unit}, {world_size} processes times "
            f"micro-batches of {micro}; the nearest: {near}"
        )
    return micro


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of one process per optimizer step. InputError when the global batch does not divide evenly."""
    return train.batch // (world_size * micro_batch_size(train, world_size))


def engine_kind(
    train: TrainConfig, engine: EngineConfig, world_size: int
) -> Literal["local", "deepspeed"]:
    """The engine that so many processes train with."""
    if engine.kind == "auto":
        return "local" if world_size == 1 and train.precision != "bfloat16_weights" else "deepspeed"
    return engine.kind


def deepspeed_config(
    optim: OptimConfig, train: TrainConfig, engine: EngineConfig, world_size: int, parameters: int
) -> dict[str, Any]:
    """DeepSpeed's configuration for a model of so many parameters. InputError where ``engine.deepspeed`` sets what
    another setting owns."""
    owners = {
        "train_batch_size": "train.batch",
        "train_micro_batch_size_per_gpu": "train.micro_batch",
        "gradient_accumulation_steps": "train.micro_batch",
        "gradient_clipping": "optim.clip",
        "optimizer": "the optim section",
        "scheduler": "the optim section",
        "fp16": "train.precision",
        "bf16": "train.precision",
        "torch_autocast": "train.precision",
        "data_types": "train.precision",
    }
    for key, owner in owners.items():
        if key in engine.deepspeed:
            raise InputError(f"engine.deepspeed.{key}: is computed; set it by {owner}")
    if "stage" in engine.deepspeed.get("zero_optimization", {}):
        raise InputError(
            "engine.deepspeed.zero_optimization.stage: is computed; set it by engine.zero_stage"
        )
    # The default allocates 2 GB at once, whatever the model. DeepSpeed asks for a multiple of its alignment.
    bucket = min(math.ceil(parameters / 1024) * 1024, 50_000_000)
    offloaded = {
        "none": (),
        "optimizer": ("offload_optimizer",),
        "all": ("offload_optimizer", "offload_param"),
    }
    computed = {
        "train_micro_batch_size_per_gpu": micro_batch_size(train, world_size),
        "gradient_accumulation_steps": accumulation(train, world_size),
        "gradient_clipping": optim.clip
        if engine.zero_stage
        else 0.0,  # unset it is 1; stage 0 clips by _clip
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **{key: {"device": "cpu", "pin_memory": True} for key in offloaded[engine.offload]},
        },
        "zero_force_ds_cpu_optimizer": False,  # with offload, too, the update is torch's fused AdamW
        "steps_per_print": None,
        # Left to itself, DeepSpeed would add up and reduce the gradients of bfloat16 weights in bfloat16.
        **(
            {
                "bf16": {"enabled": True},
                "data_types": {"grad_accum_dtype": "fp32"},
                "communication_data_type": "fp32",
            }
            if train.precision == "bfloat16_weights"
            else {}
        ),
    }
    return _merge(computed, engine.deepspeed)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Tables merged key by key; where both have a value, ``over``'s."""
    both = {
        key: _merge(under[key], value)
        if isinstance(value, dict) and isinstance(under.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**under, **both}
