"""What tests/stand_in.py stands for: a device that does not mix, casts as CUDA, and is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.stand_in import GPU, REAL, Counts, StandIn, stand_in_gpu

pytestmark = pytest.mark.skipif(REAL, reason="the stand-in is not in use")


def test_devices_do_not_mix(counts: Counts) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.device == GPU and there.is_cuda and isinstance(here.to("cuda"), StandIn)
    for mix in (lambda: here + there, lambda: torch.cat([there, here]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match=r"same device, but found .* cuda:0 and cpu"):
            mix()
    with pytest.raises(TypeError, match=r"Tensor\.cpu\(\)"):
        there.numpy()
    assert (there * torch.tensor(2.0)).tolist() == [2.0] * 3, "a number on the CPU may be mixed in"
    assert torch.equal(there.cpu(), here)


def test_kernels_and_host_syncs_are_counted(counts: Counts) -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3).t()
    assert counts.kernels.total() == 1 and not counts.syncs
    y = x @ x.t() + 1
    assert counts.kernels.total() == 3 and not counts.syncs
    for number, wait in enumerate(
        [
            lambda: float(y[0, 0]),
            y.tolist,
            lambda: bool(y.any()),
            y.cpu,
            lambda: torch.ones(2).to("cuda"),
            lambda: torch.tensor([1, 2], device="cuda"),
            y.nonzero,
            lambda: y[y > 0],
            lambda: y[torch.tensor([0])],
            lambda: y.copy_(torch.zeros(3, 3)),
        ],
        start=1,
    ):
        wait()
        assert counts.syncs.total() == number
    torch.ones(2).to("cuda", non_blocking=True)
    y.copy_(torch.zeros(3, 3), non_blocking=True)
    y[y > 0] = 0.0
    assert counts.syncs.total() == 10


def test_autocast_casts_as_on_cuda(counts: Counts) -> None:
    """CUDA computes norms in float32 under autocast, and a CPU does not."""
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        assert F.rms_norm(x.to("cuda"), (4,)).dtype == torch.float32
        assert F.softmax(x.to("cuda"), -1).dtype == torch.float32
        assert F.linear(x.to("cuda").float(), x.to("cuda")).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert F.rms_norm(x, (4,)).dtype == torch.bfloat16


def test_gradients_are_those_of_a_cpu() -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.RMSNorm(8)), torch.randn(3, 4)
    module(x).square().sum().backward()
    wanted = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    with stand_in_gpu():
        moved = module.to("cuda")
        moved(x.to("cuda")).square().sum().backward()
        found = [parameter.grad for parameter in moved.parameters()]
        assert all(gradient.device == GPU for gradient in found)
        found = [gradient.cpu() for gradient in found]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_left_changed() -> None:
    before = torch.cuda.is_available, torch.cuda.Event, torch.autocast.__init__
    with pytest.raises(ZeroDivisionError), stand_in_gpu():
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        raise ZeroDivisionError
    assert before == (torch.cuda.is_available, torch.cuda.Event, torch.autocast.__init__)
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
    assert not torch.cuda.is_available()
    assert not torch.overrides._get_current_function_mode_stack()
