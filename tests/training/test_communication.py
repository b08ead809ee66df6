"""What `r2id plan` says of communication: against what DeepSpeed sends, and worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r2id.dist import World
from r2id.errors import InputError
from r2id.training.communication import Gpu, find_gpu, seconds, step_time, traffic
from r2id.training.memory_estimate import Sharding
from tests.training import engine_ranks as job
from tests.training.children import Ranks

ACCUMULATION = job.BATCH // job.MICRO // 2
GPU = Gpu(name="small", memory=1, tflops=1, per_node=8, intra_node=100, inter_node=50)


class Sent(TorchDispatchMode):
    """Counts the bytes that this process sends around a ring of two."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [part.nbytes for part in tree_leaves(args) if isinstance(part, Tensor)]
            twice = "allreduce" in str(func)
            self.bytes += max(sizes, default=0) / 2 * (2 if twice else 1)
        return func(*args, **(kwargs or {}))


def send(world: World, stage: int, precision: str, zero: dict[str, Any]) -> tuple[float, list[int]]:
    """Train; return what the last step sent, and the numbers of elements of the weights."""
    engine = job.make("deepspeed", stage, world, "r2id", precision, **zero)
    tensors = [getattr(p, "ds_numel", p.numel()) for p in engine.names.values()]
    job.run(engine, 0, 3, world, "r2id")
    with Sent() as sent:
        job.run(engine, 3, 4, world, "r2id")
    return sent.bytes, tensors


SENT: list[tuple[int, str, dict[str, Any]]] = [
    (0, "float32", {}),
    (1, "float32", {}),
    (2, "float32", {}),
    (2, "bfloat16_weights", {}),
    (3, "float32", {}),
    (3, "float32", {"stage3_param_persistence_threshold": 200}),
    (3, "bfloat16_weights", {"stage3_param_persistence_threshold": 0}),
]


@pytest.mark.parametrize(
    ("stage", "precision", "zero"),
    [
        pytest.param(*case, marks=pytest.mark.slow if i not in (1, 5) else ())
        for i, case in enumerate(SENT)
    ],
)
def test_deepspeed_sends_what_the_plan_counts(
    ranks: Ranks, stage: int, precision: str, zero: dict[str, Any]
) -> None:
    sent, tensors = ranks(send, stage, precision, zero)[0]
    counted = traffic(sharding(stage, sum(tensors), 2, precision, zero), tensors)
    # DeepSpeed pads shares, and reduces a few scalars.
    assert sent == pytest.approx(counted.total, rel=0.02)


def sharding(
    stage: int | None,
    elements: int,
    processes: int,
    precision: str = "float32",
    zero: dict[str, Any] | None = None,
) -> Sharding:
    narrow = precision == "bfloat16_weights"
    return Sharding(elements, processes, stage, 1, ACCUMULATION, zero or {}, narrow)


def test_overlap_is_deepspeeds_default_at_stage_3_alone() -> None:
    found = [traffic(sharding(stage, 800, 4), [800]) for stage in range(4)]
    # 800 weights are 3,200 bytes, of which each of four processes sends three quarters a pass:
    # 2,400. Reducing takes two passes; stages 2 and 3 reduce after each of two micro-batches.
    assert [part.exposed for part in found] == [4800, 7200, 12000, 0]
    # Stage 3 reduces and scatters twice, in one pass each, and gathers small weights once.
    assert [part.hidden for part in found] == [0, 0, 0, 7200]
    overlapped = traffic(sharding(2, 800, 4, zero={"overlap_comm": True}), [800])
    assert (overlapped.exposed, overlapped.hidden) == (2400, 9600)


def test_the_slower_links_decide_and_what_is_hidden_costs_nothing() -> None:
    assert traffic(sharding(None, 800, 1), [800]).total == 0
    assert seconds(100e9, 8, GPU) == 1 and seconds(100e9, 16, GPU) == 2
    alone = find_gpu("rtx5080", intra_node=100.0, inter_node=50.0, memory=None)
    assert (alone.memory, alone.per_node) == (16, 1) and seconds(100e9, 2, alone) == 2
    one_after_the_other = traffic(sharding(1, 25_000_000_000, 4), [1])  # 225 GB
    assert step_time(1.0, one_after_the_other, 4, GPU) == pytest.approx(1 + 2.25)
    beside = traffic(sharding(3, 25_000_000_000, 4, zero={"stage3_max_reuse_distance": 1e12}), [1])
    assert beside.hidden == pytest.approx(150e9)  # reduced alone
    assert step_time(1.0, beside, 4, GPU) == pytest.approx(1.5)
    assert step_time(2.0, beside, 4, GPU) == 2.0
    # A model too large to keep what is gathered gathers it for the forward and the backward pass.
    assert traffic(sharding(3, 2_000_000_000, 4), [2_000_000_000]).hidden == 0.75 * 8e9 * (2 + 4)
    with pytest.raises(InputError, match="gpu 'v100': must be one of a100, h100, h200, rtx5080"):
        find_gpu("v100")
