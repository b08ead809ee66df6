"""The moving average of weights."""

from __future__ import annotations

import pytest
import torch

from r2id.checkpoints.averages import exponent_of, product, reconstruction
from r2id.config import TrainConfig
from r2id.errors import InputError
from r2id.training.ema import Ema, decay_at, decays, power_decay


def average(source: torch.Tensor, limit: float) -> Ema:
    return Ema([source], decays(TrainConfig(steps=1, ema=limit)))


def test_decay_warms_up_to_its_limit() -> None:
    assert decay_at(0, 0.9995) == pytest.approx(0.1)
    assert decay_at(8, 0.9995) == pytest.approx(0.5)
    assert decay_at(10**6, 0.9995) == 0.9995
    assert decay_at(100, 0.0) == 0.0


@pytest.mark.parametrize("profiles", [(), (0.05, 0.1)])
def test_a_guide_is_the_average_of_a_share_of_the_run(profiles: tuple[float, ...]) -> None:
    train = TrainConfig(steps=8, ema=0.5, ema_profiles=profiles, guide_after=0.4)
    source = torch.zeros(3)
    averages = Ema([source], decays(train))
    seen = []
    for step in range(8):
        source += torch.randn(3)
        averages.update(step)
        seen.append(averages.averages["ema"][0].clone())
    assert torch.equal(averages.averages["guide"][0], seen[2]), "of the first three steps"
    assert not torch.equal(seen[2], seen[-1])

    goes_on = Ema([source], decays(train.model_copy(update={"steps": 30})))  # up to step 12
    goes_on.averages = averages.averages
    for step in range(8, 30):
        source += torch.randn(3)
        goes_on.update(step)
        seen.append(goes_on.averages["ema"][0].clone())
    assert torch.equal(goes_on.averages["guide"][0], seen[11])


def test_averages_follow_the_recurrence() -> None:
    source = torch.tensor([1.0, -2.0])
    ema = average(source, 0.6)
    expected = source.double().clone()
    for step in range(20):
        source.add_(0.5)
        ema.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * source
    torch.testing.assert_close(ema.averages["ema"][0].double(), expected, rtol=1e-6, atol=1e-6)


def test_of_a_line_lags_by_decay_over_one_minus_decay() -> None:
    """The steady state of an average of a weight that grows by 1 a step."""
    source = torch.zeros(1)
    ema = average(source, 0.75)
    for step in range(200):
        source.add_(1.0)
        ema.update(step)
    assert float(source - ema.averages["ema"][0]) == pytest.approx(0.75 / 0.25, rel=1e-5)


def test_zero_decay_is_the_source_itself() -> None:
    source = torch.tensor([3.0])
    ema = average(source, 0.0)
    source.fill_(5.0)
    ema.update(0)
    assert torch.equal(ema.averages["ema"][0], source)


def test_keeps_no_graph() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    ema = average(parameter, 0.9)
    ema.update(0)
    assert not ema.averages["ema"][0].requires_grad


@pytest.mark.parametrize("sigma", [0.001, 0.05, 0.1, 0.25, 0.28])
def test_exponent_is_the_inverse_of_the_width(sigma: float) -> None:
    gamma = exponent_of(sigma)
    assert gamma > 0
    width = ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5
    assert width == pytest.approx(sigma, rel=1e-9)


def test_widths_known_beforehand() -> None:
    assert exponent_of(12**-0.5) == pytest.approx(
        0, abs=1e-9
    )  # γ = 0 is the plain mean, whose deviation is t/√12
    assert exponent_of(0.05) == pytest.approx(16.97, abs=0.01) and exponent_of(
        0.10
    ) == pytest.approx(6.94, abs=0.01)


@pytest.mark.parametrize("sigma", [0.05, 0.2])
def test_width_is_the_deviation_of_the_profile(sigma: float) -> None:
    gamma, t = exponent_of(sigma), torch.linspace(0, 1, 200_001, dtype=torch.float64)
    profile = (gamma + 1) * t**gamma
    mean = torch.trapezoid(profile * t, t)
    assert float(torch.trapezoid(profile, t)) == pytest.approx(1, rel=1e-6)
    assert float(torch.trapezoid(profile * (t - mean) ** 2, t)) ** 0.5 == pytest.approx(
        sigma, rel=1e-6
    )


def test_power_decay_forgets_the_beginning_and_makes_integrals_of_the_profile() -> None:
    """The weight of step i (from 1) in the average of step t is the integral of p over (i − 1, i).

    That is (i/t)^(γ+1) − ((i − 1)/t)^(γ+1).
    """
    gamma, steps = 6.9, 50
    weights: list[float] = []
    for step in range(steps):
        decay = power_decay(step, gamma)
        weights = [weight * decay for weight in weights] + [1 - decay]
    expected = [
        (i / steps) ** (gamma + 1) - ((i - 1) / steps) ** (gamma + 1) for i in range(1, steps + 1)
    ]
    assert power_decay(0, gamma) == 0 and sum(weights) == pytest.approx(1)
    assert weights == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("one", "other"),
    [((0.05, 100.0), (0.05, 100.0)), ((0.05, 40.0), (0.2, 100.0)), ((0.1, 100.0), (0.05, 70.0))],
)
def test_product_is_the_integral(one: tuple[float, float], other: tuple[float, float]) -> None:
    at = torch.linspace(0, 100, 1_000_001, dtype=torch.float64)
    values = torch.ones_like(at)
    for sigma, t in (one, other):
        gamma = exponent_of(sigma)
        values *= torch.where(at <= t, (gamma + 1) * (at / t) ** gamma / t, 0.0)
    assert product(one, other) == pytest.approx(float(torch.trapezoid(values, at)), rel=1e-4)
    assert product(one, other) == product(other, one)


def test_product_of_late_steps_does_not_overflow() -> None:
    assert product((0.001, 1e7), (0.001, 1e7)) > 0


def test_what_is_in_store_is_reconstructed_exactly() -> None:
    store = [(sigma, float(t)) for t in (100, 200, 300) for sigma in (0.05, 0.1)]
    coefficients, misfit = reconstruction(store, (0.1, 300.0))
    assert coefficients == pytest.approx([0, 0, 0, 0, 0, 1], abs=1e-6) and misfit < 1e-6


def test_more_snapshots_fit_better_and_a_lone_one_says_that_it_does_not() -> None:
    misfits = []
    for count in (1, 4, 16, 64):
        store = [(sigma, 640.0 * (i + 1) / count) for i in range(count) for sigma in (0.05, 0.1)]
        coefficients, misfit = reconstruction(store, (0.15, 640.0))
        assert sum(coefficients) == pytest.approx(1)
        misfits.append(misfit)
    assert misfits == sorted(misfits, reverse=True) and misfits[0] > 0.1 and misfits[-1] < 0.01


@pytest.mark.parametrize("sigma", [0.04, 0.075, 0.15, 0.25])
def test_reconstruction_of_a_wandering_weight_is_the_average_tracked_beside_it(
    sigma: float,
) -> None:
    torch.manual_seed(0)
    source = torch.zeros(1000, dtype=torch.float64)
    kept = Ema([source], decays(TrainConfig(steps=1, ema_profiles=(0.05, 0.1))))
    tracked = Ema([source], decays(TrainConfig(steps=1, ema_profiles=(sigma,))))
    store, values = [], []
    for step in range(2000):
        source += torch.randn(1000, dtype=torch.float64)
        kept.update(step)
        tracked.update(step)
        if (step + 1) % 62 == 0 or step == 1999:
            store += [(0.05, step + 1.0), (0.1, step + 1.0)]
            values += [kept.averages[kind][0].clone() for kind in ("ema", "ema-0.1")]
    coefficients, misfit = reconstruction(store, (sigma, 2000.0))
    made = sum(c * value for c, value in zip(coefficients, values, strict=True))
    exact = tracked.averages["ema"][0]
    error = float(
        (made - exact).norm() / (source - exact).norm()
    )  # relative to how far it is from the last weights
    assert error < 0.02 and misfit < 0.1
    nearest = min(
        float((other.averages[kind][0] - exact).norm() / (source - exact).norm())
        for other, kind in ((kept, "ema"), (kept, "ema-0.1"))
    )
    assert error < nearest / 5


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("train.ema_profiles=[0.1,0.1]", r"ema_profiles.*0\.1, 0\.1"),
        ("train.ema_profiles=[0.3]", r"ema_profiles.*0\.28"),
        ("train.ema_profiles=[0]", r"ema_profiles.* 0"),
        ("train.ema_snapshot_every=5", "ema_snapshot_every"),
    ],
)
def test_profiles_that_are_none(table: str, named: str) -> None:
    from r2id.config import load_config
    from tests.conftest import CONFIGS

    with pytest.raises(InputError, match=named):
        load_config(CONFIGS / "digits" / "riae.toml", [table])
