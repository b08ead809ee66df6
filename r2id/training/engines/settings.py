"""Choosing an engine for a number of processes, and computing DeepSpeed's configuration."""

from __future__ import annotations

import math
from typing import Any, Literal

from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.errors import InputError

_OWNERS = {
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
"""Keys of DeepSpeed's configuration that may not be set, and the settings that decide them."""

_OFFLOADED = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "all": ("offload_optimizer", "offload_param"),
}


def engine_kind(
    train: TrainConfig, engine: EngineConfig, world_size: int
) -> Literal["local", "deepspeed"]:
    """Return the kind of engine for this number of processes."""
    if engine.kind == "auto":
        return "local" if world_size == 1 and train.precision != "bfloat16_weights" else "deepspeed"
    return engine.kind


def deepspeed_config(
    optim: OptimConfig, train: TrainConfig, engine: EngineConfig, world_size: int, parameters: int
) -> dict[str, Any]:
    """Compute DeepSpeed's configuration for a model with this number of parameters.

    ``engine.deepspeed`` is merged over it. Raises InputError when it has a key that another setting
    decides.
    """
    _refuse_owned(engine.deepspeed)
    # DeepSpeed's default bucket takes 2 GB however small the model is. This one is at most as large
    # as the model, rounded up because DeepSpeed wants a multiple of its alignment.
    bucket = min(math.ceil(parameters / 1024) * 1024, 50_000_000)
    computed = {
        "train_micro_batch_size_per_gpu": micro_batch_size(train, world_size),
        "gradient_accumulation_steps": accumulation(train, world_size),
        # DeepSpeed's default is 1. At stage 0 the engine clips by itself (DeepSpeedEngine._clip).
        "gradient_clipping": optim.clip if engine.zero_stage else 0.0,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            **{key: {"device": "cpu", "pin_memory": True} for key in _OFFLOADED[engine.offload]},
        },
        # With offload, too, use torch's fused AdamW as everywhere else, and not DeepSpeed's own.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if train.precision == "bfloat16_weights":
        # By default DeepSpeed would accumulate and reduce the gradients of bfloat16 weights in
        # bfloat16, which loses small contributions.
        computed |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return _merge(computed, engine.deepspeed)


def _refuse_owned(deepspeed: dict[str, Any]) -> None:
    """Raise InputError for the first key that another setting decides, or for what is no table."""
    for key, owner in _OWNERS.items():
        if key in deepspeed:
            raise InputError(f"engine.deepspeed.{key}: is computed; set it by {owner}")
    zero = deepspeed.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise InputError(
            f"engine.deepspeed.zero_optimization = {zero!r}: must be a table; the stage is "
            "engine.zero_stage"
        )
    if "stage" in zero:
        raise InputError(
            "engine.deepspeed.zero_optimization.stage: is computed; set it by engine.zero_stage"
        )


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge nested tables key by key; where both have a value, take that of ``over``."""
    merged = {
        key: _merge(under[key], value)
        if isinstance(value, dict) and isinstance(under.get(key), dict)
        else value
        for key, value in over.items()
    }
    return {**under, **merged}
