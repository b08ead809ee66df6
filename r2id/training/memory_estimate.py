"""Estimating the memory that a training step takes on each GPU: what is held, and in which phase.

The states that ZeRO shards (weights, gradients, Adam's moments, averages) follow from the number of
elements (Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter
Models", arXiv:1910.02054, section 5). All are float32, except bfloat16 weights and their gradients.
Activations are counted by running the model on tensors without contents (r2id.models.tracing).

Letters: P elements of the model · N processes · T instants of a traced micro-batch. All sizes are
bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from r2id.models.tracing import Trace

_FLOAT = 4
# Defaults of DeepSpeed, in elements.
_FLATTENED = 500_000_000  # gradients that stage 0 flattens and reduces at once
_BUCKET = 500_000_000  # the bucket in which stages 1 to 3 collect gradients

_TRANSIENT = ("gradients", "activations", "buffers")
"""What comes and goes within a step; all else is held all the time."""

Phase = dict[str, np.ndarray | int]
"""Bytes of what is transient in one phase of a step, by kind: [T], or a constant."""


@dataclass(frozen=True)
class Sharding:
    """How a job of N processes keeps the states of a model of P elements."""

    elements: int
    processes: int
    stage: int | None
    """ZeRO stage; None is plain PyTorch in one process."""
    averages: int
    """Number of moving averages of the weights."""
    accumulation: int
    """Micro-batches of a process per step."""
    zero: dict[str, Any]
    """The ``zero_optimization`` section of DeepSpeed's configuration."""
    bfloat16_weights: bool = False
    """Whether the forward pass's weights and their gradients are bfloat16 (stages 2 and 3)."""

    @property
    def whole(self) -> int:
        """Bytes of all weights in float32, and of anything of their shape (gradients, a moment)."""
        return _FLOAT * self.elements

    @property
    def own(self) -> int:
        """Bytes of one process's share of ``whole``."""
        return self.whole // self.processes

    def in_weight_dtype(self, size: int) -> int:
        """Convert a size in float32 to the size in the number format of the forward weights."""
        return size // 2 if self.bfloat16_weights else size

    def bucket(self, name: str, default: int) -> int:
        """Return the float32 bytes of one of DeepSpeed's buffers, at most those of the model.

        ``name`` is the key in DeepSpeed's configuration that sets its number of elements.
        """
        return _FLOAT * min(self.elements, int(self.zero.get(name, default)))


def states(sharding: Sharding) -> dict[str, int]:
    """Return the bytes that a GPU holds all the time, by part.

    Stages 1 to 3 hold the forward pass's weights and, beside them, a float32 share of the weights
    that the optimizer updates (the masters), which counts as the optimizer's. Offloaded states are
    in the CPU's memory and do not count.
    """
    whole, own = sharding.in_weight_dtype(sharding.whole), sharding.own
    if not sharding.stage:
        # Adam has two moments; the weights are their own masters.
        return {"weights": whole, "optimizer": 2 * whole, "ema": sharding.averages * whole}
    on_gpu = 0 if "offload_optimizer" in sharding.zero else 1
    weights = whole
    if sharding.stage == 3:
        weights = 0 if "offload_param" in sharding.zero else sharding.in_weight_dtype(own)
    return {  # three: masters and Adam's two moments
        "weights": weights,
        "optimizer": on_gpu * 3 * own,
        "ema": on_gpu * sharding.averages * own,
    }


def phases(sharding: Sharding, trace: Trace) -> list[Phase]:
    """List the phases of a step in which memory may peak, with the transient bytes of each."""
    kept = trace.activations + trace.casts
    if not sharding.stage:
        before = sharding.whole if sharding.accumulation > 1 else 0
        reduced = 0 if sharding.stage is None else _FLOAT * min(sharding.elements, _FLATTENED)
        return [
            # The last micro-batch, on top of the gradients of earlier ones.
            {"gradients": np.maximum(trace.gradients, before), "activations": kept},
            # Reducing (with DeepSpeed), then the update.
            {"gradients": sharding.whole, "buffers": reduced},
        ]
    return {1: _stage_1, 2: _stage_2, 3: _stage_3}[sharding.stage](sharding, trace, kept)


def _stage_1(sharding: Sharding, trace: Trace, kept: np.ndarray) -> list[Phase]:
    """List the phases at stage 1, where gradients stay whole until the last micro-batch.

    Then they are reduced through the bucket, and each rank keeps its share.
    """
    whole, own = sharding.whole, sharding.own
    bucket = sharding.bucket("reduce_bucket_size", _BUCKET)
    before = whole if sharding.accumulation > 1 else 0
    return [
        # The last micro-batch.
        {"gradients": np.maximum(trace.gradients, before), "activations": kept, "buffers": bucket},
        # Reducing the gradients.
        {"gradients": whole, "buffers": max(bucket, own)},
        # The update.
        {"gradients": own, "buffers": own},
    ]


def _stage_2(sharding: Sharding, trace: Trace, kept: np.ndarray) -> list[Phase]:
    """List the phases at stage 2, where gradients go to the bucket as the backward pass makes them.

    A full bucket is copied flat and reduced, and each rank keeps its share. With bfloat16 weights,
    the bucket and its flat copy are bfloat16. They are reduced as another copy in float32, and the
    result goes straight into the rank's float32 share.
    """
    own, bucket = sharding.own, sharding.bucket("reduce_bucket_size", _BUCKET)
    before = own if sharding.accumulation > 1 else 0
    full = (trace.gradients >= sharding.in_weight_dtype(bucket)) & (bucket < sharding.whole)
    if sharding.bfloat16_weights:
        half = sharding.in_weight_dtype(bucket)
        return [
            # The last micro-batch.
            {
                "gradients": np.maximum(before, own * full),
                "activations": kept,
                "buffers": half + (half + bucket) * full,
            },
            # Reducing the last bucket.
            {"gradients": own, "buffers": 2 * half + bucket},
            # The update.
            {"gradients": own, "buffers": own},
        ]
    return [
        # The last micro-batch.
        {"gradients": before + own * full, "activations": kept, "buffers": bucket * (1 + full)},
        # Reducing the last bucket.
        {"gradients": before, "buffers": 2 * bucket},
        # Adding this micro-batch's share to that of earlier ones.
        {"gradients": before + own, "buffers": bucket},
        # The update.
        {"gradients": own, "buffers": own},
    ]


def _stage_3(sharding: Sharding, trace: Trace, _kept: np.ndarray) -> list[Phase]:
    """List the phases at stage 3, where weights are gathered for the forward and backward passes.

    Gathered weights stay until their limit (``stage3_max_live_parameters``) is reached. Autocast's
    bfloat16 copies of weights do not count, because DeepSpeed's linear layers keep none.
    """
    own, bucket = sharding.own, sharding.bucket("reduce_bucket_size", _BUCKET)
    gathered = fetched = 0
    if sharding.processes > 1:
        live = sharding.bucket("stage3_max_live_parameters", 1_000_000_000)
        gathered = sharding.in_weight_dtype(live)
        fetched = sharding.in_weight_dtype(
            sharding.bucket("stage3_prefetch_bucket_size", 50_000_000)
        )
    full = (trace.gradients >= sharding.in_weight_dtype(bucket)) & (bucket < sharding.whole)
    forward = np.arange(len(full)) < trace.forward
    return [
        # The last micro-batch.
        {
            "gradients": own,
            "activations": trace.activations,
            "buffers": bucket + gathered + fetched * forward + 2 * bucket * full,
        },
        # Reducing the last bucket.
        {"gradients": own, "buffers": 3 * bucket},
        # The update.
        {"gradients": 2 * own, "buffers": bucket},
    ]


def peak(sharding: Sharding, trace: Trace, codec: int = 0, encode: int = 0) -> dict[str, int]:
    """Estimate the bytes of one process at the fullest instant of a step, by part and in total.

    ``codec`` is the bytes of the codec's weights, held all the time; ``encode`` is the bytes that
    encoding a micro-batch takes, before R2ID's own forward pass begins.
    """
    before = sharding.whole if sharding.accumulation > 1 and (sharding.stage or 0) < 2 else 0
    parts: dict[str, int] = {}
    encoding: Phase = {"gradients": before, "activations": encode}
    for phase in (*phases(sharding, trace), encoding):
        series = {
            name: np.broadcast_to(phase.get(name, 0), len(trace.activations)) for name in _TRANSIENT
        }
        fullest = int(np.sum(list(series.values()), axis=0).argmax())
        held = {name: int(values[fullest]) for name, values in series.items()}
        parts = max(parts, held, key=lambda sizes: sum(sizes.values()))
    parts = {**states(sharding), **parts} | ({"codec": codec} if codec else {})
    return {**parts, "total": sum(parts.values())}
