"""Autocast gives the same number formats on a GPU as on a CPU, where memory is counted.

CUDA's list of operations that compute in float32 is longer than a CPU's, so that ``F.rms_norm``,
say, returns float32 on a GPU alone: activations twice as large, and matrix products of float32. Any
build of PyTorch has both lists, in its table of kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from r2id.config import RiaeRun, Run, load_config
from r2id.models.tracing import trace_step
from r2id.training.workload import Dimensions, Workload
from tests.conftest import CONFIGS

# On CUDA's list, but cast to the widest of their inputs, as they are without autocast too.
PROMOTED = {"addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put"}
PROMOTED |= {"scatter_add", "tensordot", "vdot", "cat", "stack", "index_copy"}
# On CUDA's list of bfloat16; made of products that are on both lists.
MADE_OF_PRODUCTS = {"einsum", "chain_matmul", "linalg_multi_dot", "convolution", "_convolution"}


def on_one_list_alone() -> list[str]:
    """Operations that autocast changes on one kind of device alone."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")]
    return [
        name
        for name in names
        if has(name, "AutocastCUDA") != has(name, "AutocastCPU")
        and name.removeprefix("aten::").split(".")[0] not in PROMOTED | MADE_OF_PRODUCTS
    ]


@contextmanager
def noted() -> Iterator[set[str]]:
    """Note which of them a CPU's autocast meets with bfloat16."""
    found: set[str] = set()
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def kernel(name: str) -> Any:
        base, _, overload = name.removeprefix("aten::").partition(".")
        operation = getattr(getattr(torch.ops.aten, base), overload or "default")

        def run(*args: Any, **kwargs: Any) -> Any:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            if any(tensor.dtype == torch.bfloat16 for tensor in tensors):
                found.add(base)
            with torch._C._ExcludeDispatchKeyGuard(below):
                return operation(*args, **kwargs)

        return run

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name in on_one_list_alone():
            library.impl(name, kernel(name), "AutocastCPU", allow_override=True)
        yield found


NARROW = ["r2id.width=32", "r2id.heads=2", "r2id.encoder_blocks=1", "r2id.decoder_blocks=1"]
CASES: dict[str, tuple[str, list[str]]] = {
    "R2ID": ("mnist/reference-r2id", NARROW),
    "tiled, axial": (
        "mnist/reference-r2id",
        [*NARROW[:2], 'r2id.attention=["tiled","axial","linear"]'],
    ),
    "levels": ("mnist/pixel-hourglass-r2id", NARROW),
    "RIAE": ("mnist/reference-riae", ["loss.magnify=0.5"]),
    "RIAE, discriminator": ("photos/faces-sharp-riae", ["loss.spectrum=0.1", "loss.ssim=0.1"]),
    "RIAE by attention": ("mnist/published-riae", ["riae.width=32", "riae.heads=2"]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_step_has_the_number_formats_of_a_gpu(case: str) -> None:
    config, overrides = CASES[case]
    run = load_config(CONFIGS / f"{config}.toml", [*overrides, "train.precision=bfloat16"])
    with noted() as found:
        workload_of(run).trace(2, as_on_gpu=True)
    assert not found


def workload_of(run: Run) -> Workload:
    if isinstance(run, RiaeRun):
        return Workload(run, Dimensions((16, 16), 1))
    codec = load_config(CONFIGS / "mnist" / "reference-riae.toml")
    assert isinstance(codec, RiaeRun)
    return Workload(run, Dimensions((16, 16), 1, 10, codec.riae if run.codec else None))


def test_a_norm_keeps_what_a_gpu_keeps() -> None:
    """A GPU's autocast has F.rms_norm compute in float32; its kernel keeps no intermediates."""

    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, x: Tensor, step: int) -> tuple[Tensor, None]:
            return F.rms_norm(x, (1000,), self.weight.to(x.dtype)).sum(), None

    def activations(bfloat16: bool) -> int:
        trace = trace_step(
            lambda: (Norm(), {"x": torch.zeros(64, 1000, dtype=torch.bfloat16)}), bfloat16
        )
        return int(trace.activations[trace.forward - 1])

    # Without autocast only the bfloat16 input, with it its float32 copy too; two numbers per row.
    assert activations(False) == pytest.approx(2 * 64_000, rel=0.05)
    assert activations(True) == pytest.approx((2 + 4) * 64_000, rel=0.05)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_a_difference_is_noted() -> None:
    x = torch.randn(4, 8)
    with noted() as found, torch.autocast("cpu", torch.bfloat16):
        F.rms_norm(x, (8,))
        assert not found
        F.rms_norm(x @ x.T, (4,))
    assert found == {"rms_norm"}
    with torch.autocast("cpu", torch.bfloat16):  # the CPU's own kernels are back
        assert F.rms_norm(x @ x.T, (4,)).dtype == torch.bfloat16
    assert len(found) == 1
