"""The moving average of weights."""

from __future__ import annotations

import pytest
import torch

from r2id.training.ema import Ema, decay_at


def test_decay_warms_up_to_its_limit() -> None:
    assert decay_at(0, 0.9995) == pytest.approx(0.1)
    assert decay_at(8, 0.9995) == pytest.approx(0.5)
    assert decay_at(10**6, 0.9995) == 0.9995
    assert decay_at(100, 0.0) == 0.0


def test_averages_follow_the_recurrence() -> None:
    source = torch.tensor([1.0, -2.0])
    ema = Ema([source], 0.6)
    expected = source.double().clone()
    for step in range(20):
        source.add_(0.5)
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * source
    torch.testing.assert_close(ema.averages[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_of_a_line_lags_by_decay_over_one_minus_decay() -> None:
    """The steady state of an average of a weight that grows by 1 a step."""
    source = torch.zeros(1)
    ema = Ema([source], 0.75)
    for step in range(200):
        source.add_(1.0)
        ema.update(step)
    assert float(source - ema.averages[0]) == pytest.approx(0.75 / 0.25, rel=1e-5)


def test_zero_decay_is_the_source_itself() -> None:
    source = torch.tensor([3.0])
    ema = Ema([source], 0.0)
    source.fill_(5.0)
    ema.update(0)
    assert torch.equal(ema.averages[0], source)


def test_keeps_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ema = Ema([parameter], 0.9)
    ema.update(0)
    assert not ema.averages[0].requires_grad
