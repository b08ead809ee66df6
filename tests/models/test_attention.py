"""Attention: the window's identity, and both ways of computing it."""

import math

import pytest
import torch
import torch.nn.functional as F

from r2id.models import attention
from r2id.models.attention import Attention, RMSNorm, attend
from r2id.models.coords import grid_coordinates
from r2id.models.riae import _in_cells


def test_window_is_a_gaussian_in_cells():
    """With no content, weights are softmax(−s·|u_q − u_k|²)."""
    layer = Attention(32, 32, heads=2, local=True)
    torch.nn.init.zeros_(layer.query.weight)
    at, context_at = torch.randn(1, 3, 2), torch.randn(1, 6, 2)
    values = torch.randn(1, 6, 32)
    q, k, v = (
        torch.zeros(1, 2, 3, 10),
        torch.randn(1, 2, 6, 10),
        layer.value(values).view(1, 6, 2, 16).transpose(1, 2),
    )
    attended = attend(*layer._with_window(q, k, v, at, context_at))
    distance = (at[:, :, None] - context_at[:, None]).square().sum(-1)
    weights = torch.softmax(
        -torch.exp(-layer.log_reach).view(1, 2, 1, 1) * distance.unsqueeze(1), dim=-1
    )
    torch.testing.assert_close(attended, weights @ v, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("grid", [(8, 8), (16, 9), (64, 64)])
def test_bfloat16_places_the_window_as_float32_does(grid):
    torch.manual_seed(0)
    layer = Attention(64, 64, heads=2, local=True)
    at = _in_cells(grid_coordinates(grid).unsqueeze(0), grid)
    x = torch.randn(1, at.shape[1], 64)
    exact = layer(x, x, at, at)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(x, x, at, at)
    assert F.mse_loss(rounded.float(), exact) < 3e-3 * exact.square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_agree(dtype, monkeypatch):
    q, k, v = (torch.randn(2, 4, n, 16, dtype=dtype) for n in (9, 20, 20))
    plain = attend(q, k, v)
    monkeypatch.setattr(attention, "_SMALL_SCORES", 0)
    torch.testing.assert_close(
        plain, attend(q, k, v), atol=2e-2 if dtype == torch.bfloat16 else 1e-6, rtol=1e-2
    )


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


def test_impossible_heads_are_refused():
    with pytest.raises(ValueError, match="width 20 does not divide into 3 heads"):
        Attention(20, 20, heads=3)
    with pytest.raises(ValueError, match="of more than 6"):
        Attention(16, 16, heads=4, local=True)
    assert math.prod(Attention(16, 8, heads=2, local=True).query.weight.shape) == (16 - 2 * 6) * 16
