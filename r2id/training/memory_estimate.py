"""Estimate of the memory that a training step takes on each of many GPUs: what lives when.

The states that ZeRO shards (weights, gradients, Adam's moments, averages) follow from the number of
elements (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv:1910.02054, section 5); all but bfloat16 weights and their gradients is float32.
Activations are counted (r2id.models.tracing).

Letters: P elements of the model · N processes · T moments of a step. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from r2id.models.tracing import Trace

_FLOAT = 4
_FLATTENED = 500_000_000  # elements that DeepSpeed reduces at once at stage 0
_BUCKET = 500_000_000  # elements of its bucket where the configuration gives none

_PASSING = ("gradients", "activations", "buffers")

Moment = dict[str, np.ndarray | int]
"""Bytes of gradients, activations and buffers in one phase of a step: [T], or constant."""


@dataclass(frozen=True)
class Sharding:
    """How a job of N processes keeps the states of a model of P elements."""

    elements: int
    processes: int
    stage: int | None
    """ZeRO stage; none is plain PyTorch in one process."""
    averages: int
    """Number of moving averages of the weights."""
    accumulation: int
    """Micro-batches per step."""
    zero: dict[str, Any]
    """DeepSpeed's ``zero_optimization``."""
    rounded: bool = False
    """Whether the forward pass's weights and their gradients are bfloat16 (stages 2 and 3)."""

    @property
    def whole(self) -> int:
        """Bytes of all weights, or anything of their shape, in float32."""
        return _FLOAT * self.elements

    @property
    def own(self) -> int:
        """Bytes of one process's share of them."""
        return self.whole // self.processes

    def narrow(self, size: int) -> int:
        """Convert bytes in float32 to bytes in the number format of the forward pass's weights."""
        return size // 2 if self.rounded else size

    def bucket(self, name: str, default: int) -> int:
        """Return the float32 bytes of one of DeepSpeed's buffers, at most those of the model.

        ``name`` is the key of its configuration that gives the number of elements.
        """
        return _FLOAT * min(self.elements, int(self.zero.get(name, default)))


def states(sharding: Sharding) -> dict[str, int]:
    """Return what a GPU holds all the time, by part.

    Stages 1 to 3 update a float32 share of the weights, the masters, beside the weights of the
    forward pass; it counts as the optimizer's. Offloaded states are in the CPU's memory.
    """
    whole, own = sharding.narrow(sharding.whole), sharding.own
    if not sharding.stage:
        return {"weights": whole, "optimizer": 2 * whole, "ema": sharding.averages * whole}
    on_gpu = 0 if "offload_optimizer" in sharding.zero else 1
    weights = whole
    if sharding.stage == 3:
        weights = 0 if "offload_param" in sharding.zero else sharding.narrow(own)
    return {
        "weights": weights,
        "optimizer": on_gpu * 3 * own,
        "ema": on_gpu * sharding.averages * own,
    }


def moments(sharding: Sharding, trace: Trace) -> list[Moment]:
    """List the phases of a step in which memory may peak, with what is held in each."""
    kept = trace.activations + trace.casts
    if not sharding.stage:
        before = sharding.whole if sharding.accumulation > 1 else 0
        reduced = 0 if sharding.stage is None else _FLOAT * min(sharding.elements, _FLATTENED)
        return [
            {"gradients": np.maximum(trace.gradients, before), "activations": kept},
            {"gradients": sharding.whole, "buffers": reduced},
        ]
    return {1: _stage_1, 2: _stage_2, 3: _stage_3}[sharding.stage](sharding, trace, kept)


def _stage_1(sharding: Sharding, trace: Trace, kept: np.ndarray) -> list[Moment]:
    """Gradients stay whole until the last micro-batch.

    Then they go through the bucket, and a rank keeps its share.
    """
    whole, own = sharding.whole, sharding.own
    bucket = sharding.bucket("reduce_bucket_size", _BUCKET)
    before = whole if sharding.accumulation > 1 else 0
    return [
        {"gradients": np.maximum(trace.gradients, before), "activations": kept, "buffers": bucket},
        {"gradients": whole, "buffers": max(bucket, own)},
        {"gradients": own, "buffers": own},
    ]


def _stage_2(sharding: Sharding, trace: Trace, kept: np.ndarray) -> list[Moment]:
    """Gradients go to the bucket as they come; a full one is flattened and reduced.

    A rank keeps its share. With bfloat16 weights, bucket and copy are bfloat16, and a float32 copy
    is reduced, straight into the rank's float32 share.
    """
    own, bucket = sharding.own, sharding.bucket("reduce_bucket_size", _BUCKET)
    before = own if sharding.accumulation > 1 else 0
    full = (trace.gradients >= sharding.narrow(bucket)) & (bucket < sharding.whole)
    if sharding.rounded:
        half = sharding.narrow(bucket)
        return [
            {
                "gradients": np.maximum(before, own * full),
                "activations": kept,
                "buffers": half + (half + bucket) * full,
            },
            {"gradients": own, "buffers": 2 * half + bucket},
            {"gradients": own, "buffers": own},
        ]
    return [
        {"gradients": before + own * full, "activations": kept, "buffers": bucket * (1 + full)},
        {"gradients": before, "buffers": 2 * bucket},
        {"gradients": before + own, "buffers": bucket},
        {"gradients": own, "buffers": own},
    ]


def _stage_3(sharding: Sharding, trace: Trace, _kept: np.ndarray) -> list[Moment]:
    """Weights are gathered for the forward pass and stay for the backward pass, up to a limit.

    In float32: DeepSpeed's linear layers keep no copies in bfloat16.
    """
    own, bucket = sharding.own, sharding.bucket("reduce_bucket_size", _BUCKET)
    gathered = fetched = 0
    if sharding.processes > 1:
        live = sharding.bucket("stage3_max_live_parameters", 1_000_000_000)
        gathered = sharding.narrow(live)
        fetched = sharding.narrow(sharding.bucket("stage3_prefetch_bucket_size", 50_000_000))
    full = (trace.gradients >= sharding.narrow(bucket)) & (bucket < sharding.whole)
    forward = np.arange(len(full)) < trace.forward
    return [
        {
            "gradients": own,
            "activations": trace.activations,
            "buffers": bucket + gathered + fetched * forward + 2 * bucket * full,
        },
        {"gradients": own, "buffers": 3 * bucket},
        {"gradients": 2 * own, "buffers": bucket},
    ]


def peak(sharding: Sharding, trace: Trace, codec: int = 0, encode: int = 0) -> dict[str, int]:
    """Estimate the memory of one process at the fullest moment of a step, by part and in total.

    ``codec`` bytes are its weights, held all the time; ``encode`` bytes are what it takes to encode
    a micro-batch, held before the step's own work begins.
    """
    before = sharding.whole if sharding.accumulation > 1 and (sharding.stage or 0) < 2 else 0
    parts: dict[str, int] = {}
    last: Moment = {"gradients": before, "activations": encode}
    for moment in (*moments(sharding, trace), last):
        series = {
            name: np.broadcast_to(moment.get(name, 0), len(trace.activations)) for name in _PASSING
        }
        at = int(np.sum(list(series.values()), axis=0).argmax())
        found = {name: int(values[at]) for name, values in series.items()}
        parts = max(parts, found, key=lambda some: sum(some.values()))
    parts = {**states(sharding), **parts} | ({"codec": codec} if codec else {})
    return {**parts, "total": sum(parts.values())}
