"""What the processes of a training step send each other, and how long it takes.

Volumes are those of Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion
Parameter Models", arXiv:1910.02054, section 7, where DeepSpeed does as the paper says. It does not
everywhere: stages 1 and 2 reduce whole gradients to all processes, as stage 0 does; stages 2 and 3
reduce after every micro-batch; stage 3 keeps gathered weights from the forward to the backward pass
of a model below its limit.

Collectives are rings: of S bytes, each of N processes sends S·(N − 1)/N to gather or to reduce and
scatter, and twice that to reduce to all. The ring enters and leaves every node once, so that the
slower of the two kinds of links decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from r2id.errors import InputError
from r2id.training.memory_estimate import Sharding

_REUSE = 1_000_000_000  # DeepSpeed's default of stage3_max_reuse_distance, in elements
_PERSISTENT = 100_000  # of stage3_param_persistence_threshold, in elements of one tensor
_BACKWARD = 2 / 3  # of a micro-batch's time


@dataclass(frozen=True)
class Gpu:
    """What a kind of GPU, and of the computers with it, can do. Bandwidths are one way."""

    name: str
    memory: float
    """GB (10⁹ bytes)."""
    tflops: float
    """Peak of dense bfloat16 matrix products with float32 sums, in TFLOP/s."""
    per_node: int
    """GPUs of a node, as such GPUs are sold most often."""
    intra_node: float
    """GB/s from a GPU to the next one of its node."""
    inter_node: float
    """GB/s from a node to the next one, over all of its adapters."""


_KINDS = (
    Gpu("a100", 80, 312, 8, 240, 160),
    Gpu("h100", 80, 989, 8, 360, 320),
    Gpu("h200", 141, 989, 8, 360, 320),
    Gpu("rtx5080", 16, 112.6, 1, 20, 1),
)
GPUS = {kind.name: kind for kind in _KINDS}
"""By name, with memory and peak of NVIDIA's data sheets (SXM modules), and four fifths of what the
links of its own machines are made for: NVLink of 300 (A100) and 450 GB/s, eight InfiniBand adapters
of 25 and 50 GB/s a node. An RTX 5080 has PCIe 5 through the
main memory, and a network of 10 Gbit/s."""


def find_gpu(name: str, **given: Any) -> Gpu:
    """Return the GPU of a name, with the fields that are given and not None in place of its own.

    Raises InputError for an unknown name.
    """
    if name not in GPUS:
        raise InputError(f"gpu {name!r}: must be one of {', '.join(GPUS)}")
    return replace(GPUS[name], **{key: value for key, value in given.items() if value is not None})


@dataclass(frozen=True)
class Traffic:
    """Bytes that each process sends in a training step."""

    exposed: float
    """While nothing is computed."""
    hidden: float
    """Beside the computation."""
    beside: float
    """Share of the step's computation that hides the latter."""

    @property
    def total(self) -> float:
        """All bytes."""
        return self.exposed + self.hidden


def traffic(sharding: Sharding, tensors: list[int]) -> Traffic:
    """Count what each process sends in a step; ``tensors`` are the elements of each weight.

    DeepSpeed overlaps communication and computation at stage 3, and at stages 1 and 2 only with
    ``overlap_comm``, and then only the gradients'.
    """
    stage, passes = sharding.stage or 0, sharding.accumulation
    ring = (sharding.processes - 1) / sharding.processes
    reduced, gathered = sharding.whole * ring, sharding.in_weight_dtype(sharding.whole) * ring
    if stage == 3:
        return Traffic(0, reduced * passes + _gathered_in_stage_3(sharding, tensors) * ring, 1)
    gradients = 2 * reduced * (passes if stage == 2 else 1)
    weights = gathered if stage else 0
    if stage and sharding.zero.get("overlap_comm"):
        return Traffic(weights, gradients, _BACKWARD if stage == 2 else _BACKWARD / passes)
    return Traffic(gradients + weights, 0, 0)


def _gathered_in_stage_3(sharding: Sharding, tensors: list[int]) -> int:
    """Count the bytes of weights that stage 3 gathers in a step.

    Small tensors are gathered once, after the update, and kept; the others for every micro-batch,
    and for its backward pass again if the model is too large to keep them.
    """
    limit = int(sharding.zero.get("stage3_param_persistence_threshold", _PERSISTENT))
    kept = sum(count for count in tensors if count <= limit)
    reuse = int(sharding.zero.get("stage3_max_reuse_distance", _REUSE))
    times = sharding.accumulation * (1 if sharding.elements <= reuse else 2)
    return sharding.in_weight_dtype(4 * (kept + (sum(tensors) - kept) * times))


def seconds(size: float, processes: int, gpu: Gpu) -> float:
    """Return the time in which every process sends that many bytes around the ring."""
    link = gpu.intra_node
    if processes > gpu.per_node:
        link = gpu.inter_node if gpu.per_node == 1 else min(link, gpu.inter_node)
    return size / (link * 1e9)


def step_time(compute: float, sent: Traffic, processes: int, gpu: Gpu) -> float:
    """Return the seconds of a step that computes for ``compute`` seconds and sends this."""
    exposed, hidden = (seconds(size, processes, gpu) for size in (sent.exposed, sent.hidden))
    return compute + exposed + max(0.0, hidden - compute * sent.beside)
