"""Memory of a training step on each of many GPUs: what lives when.

The states that ZeRO shares out (weights, gradients, Adam's moments, averages) follow from the number of elements
(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv:1910.02054, section
5); all but bfloat16 weights and their gradients is float32. Activations are counted (r2id.models.tracing).

Letters: P elements of the model · N processes · T moments of a step. All sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from r2id.models.tracing import Trace

_FLOAT = 4
_FLATTENED = 500_000_000  # elements that DeepSpeed reduces at once at stage 0

_PASSING = ("gradients", "activations", "buffers")

Moment = dict[str, np.ndarray | int]
"""Bytes of gradients, activations and buffers: of a stretch of a step [T], or all along."""


@dataclass(frozen=True)
class Sharing:
    """How a job keeps the states of a model of P elements."""

    elements: int
    processes: int
    stage: int | None
    """ZeRO's; none is plain PyTorch in one process."""
    averages: int
    """Moving averages of the weights."""
    accumulation: int
    """Micro-batches per step."""
    zero: dict[str, Any]
    """DeepSpeed's ``zero_optimization``."""
    rounded: bool = False
    """Whether the forward pass's weights and their gradients are bfloat16 (stages 2 and 3)."""

    @property
    def whole(self) -> int:
        """All weights, or anything of their shape, in float32."""
        return _FLOAT * self.elements

    @property
    def own(self) -> int:
        """One process's share of them."""
        return self.whole // self.processes

    def narrow(self, size: int) -> int:
        """Bytes, in the number format of the forward pass's weights, of what takes so many in float32."""
        return size // 2 if self.rounded else size

    def bucket(self, name: str, default: int) -> int:
        """Bytes, in float32, of a buffer whose elements DeepSpeed's configuration states: never more than the model has."""
        return _FLOAT * min(self.elements, int(self.zero.get(name, default)))


def states(sharing: Sharing) -> dict[str, int]:
    """What a GPU holds all the time, by part. Stages 1 to 3 update a float32 share of the weights, the masters, beside the
    weights of the forward pass; it counts as the optimizer's. Offloaded states are in the CPU's memory."""
    whole, own = sharing.narrow(sharing.whole), sharing.own
    if not sharing.stage:
        return {"weights": whole, "optimizer": 2 * whole, "ema": sharing.averages * whole}
    on_gpu = 0 if "offload_optimizer" in sharing.zero else 1
    weights = (
        whole
        if sharing.stage < 3
        else 0
        if "offload_param" in sharing.zero
        else sharing.narrow(own)
    )
    return {
        "weights": weights,
        "optimizer": on_gpu * 3 * own,
        "ema": on_gpu * sharing.averages * own,
    }


def moments(sharing: Sharing, trace: Trace) -> list[Moment]:
    """The stretches of a step in which memory may peak: gradients, activations and DeepSpeed's buffers in each."""
    kept = trace.activations + trace.casts
    if not sharing.stage:
        before = sharing.whole if sharing.accumulation > 1 else 0
        reduced = 0 if sharing.stage is None else _FLOAT * min(sharing.elements, _FLATTENED)
        return [
            {"gradients": np.maximum(trace.gradients, before), "activations": kept},
            {"gradients": sharing.whole, "buffers": reduced},
        ]
    return {1: _stage_1, 2: _stage_2, 3: _stage_3}[sharing.stage](sharing, trace, kept)


def _stage_1(sharing: Sharing, trace: Trace, kept: np.ndarray) -> list[Moment]:
    """Gradients stay whole until the last micro-batch; then they go through the bucket, and a rank keeps its share."""
    whole, own, bucket = (
        sharing.whole,
        sharing.own,
        sharing.bucket("reduce_bucket_size", 500_000_000),
    )
    before = whole if sharing.accumulation > 1 else 0
    return [
        {"gradients": np.maximum(trace.gradients, before), "activations": kept, "buffers": bucket},
        {"gradients": whole, "buffers": max(bucket, own)},
        {"gradients": own, "buffers": own},
    ]


def _stage_2(sharing: Sharing, trace: Trace, kept: np.ndarray) -> list[Moment]:
    """Gradients go to the bucket as they come; a full one is flattened, reduced, and a rank keeps its share.

    Of bfloat16 weights bucket and copy are bfloat16, and a float32 copy is reduced, straight into the rank's float32 share.
    """
    own, bucket = sharing.own, sharing.bucket("reduce_bucket_size", 500_000_000)
    before = own if sharing.accumulation > 1 else 0
    full = (trace.gradients >= sharing.narrow(bucket)) & (bucket < sharing.whole)
    if sharing.rounded:
        half = sharing.narrow(bucket)
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


def _stage_3(sharing: Sharing, trace: Trace, _kept: np.ndarray) -> list[Moment]:
    """Weights are gathered for the forward pass and stay for the backward pass, up to a limit, in float32: DeepSpeed's
    linear layers keep no copies in bfloat16."""
    own, bucket = sharing.own, sharing.bucket("reduce_bucket_size", 500_000_000)
    gathered = (
        sharing.narrow(sharing.bucket("stage3_max_live_parameters", 1_000_000_000))
        if sharing.processes > 1
        else 0
    )
    fetched = (
        sharing.narrow(sharing.bucket("stage3_prefetch_bucket_size", 50_000_000))
        if sharing.processes > 1
        else 0
    )
    full = (trace.gradients >= sharing.narrow(bucket)) & (bucket < sharing.whole)
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


def peak(sharing: Sharing, trace: Trace, resident: int = 0, visitor: int = 0) -> dict[str, int]:
    """Memory of one process, by part, at the fullest moment of a step, and its sum, ``total``.

    ``resident`` bytes are there all the time, and ``visitor`` bytes before each micro-batch: the codec, and its work.
    """
    before = sharing.whole if sharing.accumulation > 1 and (sharing.stage or 0) < 2 else 0
    parts: dict[str, int] = {}
    last: Moment = {"gradients": before, "activations": visitor}
    for moment in (*moments(sharing, trace), last):
        series = {
            name: np.broadcast_to(moment.get(name, 0), len(trace.activations)) for name in _PASSING
        }
        at = int(np.sum(list(series.values()), axis=0).argmax())
        found = {name: int(values[at]) for name, values in series.items()}
        parts = max(parts, found, key=lambda some: sum(some.values()))
    parts = {**states(sharing), **parts} | ({"codec": resident} if resident else {})
    return {**parts, "total": sum(parts.values())}
