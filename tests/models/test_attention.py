"""Attention: the window's identity, and both ways of computing it."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from r2id.models.attention import Attention, RMSNorm, _key_with_window, attend, plain_up_to
from r2id.models.coords import grid_coordinates, in_cells


def test_window_is_a_gaussian_in_cells():
    """With no content, weights are softmax(−s·|u_q − u_k|²)."""
    layer = Attention(32, 32, heads=2, gaussian_window=True)
    torch.nn.init.zeros_(layer.query.weight)
    at, context_at = torch.randn(1, 3, 2), torch.randn(1, 6, 2)
    values = torch.randn(1, 6, 32)
    q, k, v = (
        torch.zeros(1, 2, 3, 10),
        torch.randn(1, 2, 6, 10),
        layer.value(values).view(1, 6, 2, 16).transpose(1, 2),
    )
    attended = attend(layer._query_with_window(q, at), _key_with_window(k, context_at), v)
    distance = (at[:, :, None] - context_at[:, None]).square().sum(-1)
    weights = torch.softmax(
        -torch.exp(-layer.log_reach).view(1, 2, 1, 1) * distance.unsqueeze(1), dim=-1
    )
    torch.testing.assert_close(attended, weights @ v, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [False, True])
def test_a_context_that_is_made_once_is_that_of_each_call(window):
    layer = Attention(32, 12, 2, gaussian_window=window)
    x, context, at, context_at = (
        torch.randn(2, n, d) for n, d in ((5, 32), (7, 12), (5, 2), (7, 2))
    )
    made = layer.context(context, context_at)
    assert torch.equal(layer(x, made, at), layer(x, context, at, context_at))
    if window:
        with pytest.raises(ValueError, match="needs the places of its queries and keys"):
            layer(x, made)


@pytest.mark.parametrize("grid", [(8, 8), (16, 9), (64, 64)])
def test_bfloat16_places_the_window_as_float32_does(grid):
    torch.manual_seed(0)
    layer = Attention(64, 64, heads=2, gaussian_window=True)
    at = in_cells(grid_coordinates(grid).unsqueeze(0), grid)
    x = torch.randn(1, at.shape[1], 64)
    exact = layer(x, x, at, at)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x, x, at, at)
    assert F.mse_loss(rounded.float(), exact) < 3e-3 * exact.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_agree(dtype):
    q, k, v = (torch.randn(2, 4, n, 16, dtype=dtype) for n in (9, 20, 20))
    plain = attend(q, k, v)
    with plain_up_to(0):
        fused = attend(q, k, v)
    torch.testing.assert_close(
        plain, fused, atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2
    )


def test_a_thread_keeps_its_kernel_while_another_counts(monkeypatch):
    """One thread asks for the fused kernel and stays in its block while another one attends, and
    leaves it while that one is in a block of its own: neither changes what the other takes."""
    fused = []
    kernel = F.scaled_dot_product_attention

    def spy(*args):
        fused.append(threading.current_thread().name)
        return kernel(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    x = torch.randn(1, 1, 4, 8)
    entered, attended, entered_too, left = (threading.Event() for _ in range(4))

    def count():
        with plain_up_to(0):
            attend(x, x, x)
            entered.set()
            assert attended.wait(30) and entered_too.wait(30)
        left.set()

    def draw():
        assert entered.wait(30)
        attend(x, x, x)  # plain: this thread asked for nothing
        attended.set()
        with plain_up_to(0):
            entered_too.set()
            assert left.wait(30)
            attend(x, x, x)
        attend(x, x, x)  # plain again

    with ThreadPoolExecutor(2, thread_name_prefix="request") as pool:
        for work in [pool.submit(count), pool.submit(draw)]:
            work.result(timeout=60)
    assert [name[-1] for name in fused] == ["0", "1"]
    attend(x, x, x)
    assert len(fused) == 2, "the default is as it was"


@pytest.mark.parametrize("scores", [0, 100])
def test_a_compiled_block_needs_no_second_graph(scores):
    x = torch.randn(1, 1, 4, 8)
    with plain_up_to(scores):
        compiled = torch.compile(attend, fullgraph=True, backend="eager")(x, x, x)
    torch.testing.assert_close(compiled, attend(x, x, x))


def test_norm_equals_its_definition():
    x = torch.randn(4, 10)
    norm = RMSNorm(10)
    torch.nn.init.normal_(norm.weight)
    expected = (
        norm.weight
        * x
        / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    )
    torch.testing.assert_close(norm(x), expected)


def test_a_window_takes_six_dimensions_of_a_head():
    assert (
        math.prod(Attention(16, 8, heads=2, gaussian_window=True).query.weight.shape)
        == (16 - 2 * 6) * 16
    )
