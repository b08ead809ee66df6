"""Schedules, objectives and solvers: identities of the equations they name."""

import math

import pytest
import torch
from torch.testing import assert_close

from r2id.config import DiffusionConfig
from r2id.diffusion import objective, schedule, solvers
from r2id.diffusion.denoising import denoising_loss, noise_levels

KINDS = ["cosine", "linear_beta", "flow"]
PAIRS = [
    ("epsilon", "cosine"),
    ("x0", "cosine"),
    ("x0", "linear_beta"),
    ("v", "cosine"),
    ("v", "linear_beta"),
    ("flow", "flow"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_noise_grows_with_time_and_stays_in_bounds(kind):
    values = schedule.log_snr(torch.linspace(0, 1, 101), kind)
    assert (values[1:] <= values[:-1]).all() and values[1:-1].unique().numel() > 90
    assert values[0] == schedule.LOG_SNR_MAX and values[-1] == schedule.LOG_SNR_MIN


def test_known_points():
    half = torch.tensor(0.5)
    assert_close(schedule.log_snr(half, "cosine"), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert_close(schedule.log_snr(half, "flow"), torch.tensor(0.0), atol=1e-6, rtol=0)
    alpha_bar = math.exp(-(0.1 * 0.5 + 0.5 * 19.9 * 0.25))
    assert_close(schedule.alpha_bar(schedule.log_snr(half, "linear_beta")), torch.tensor(alpha_bar))


@pytest.mark.parametrize("kind", KINDS)
def test_amplitudes_have_the_snr_they_are_made_of(kind):
    log_snr = torch.linspace(-9, 9, 37)
    alpha, sigma = schedule.alpha_sigma(log_snr, kind)
    assert_close(2 * torch.log(alpha / sigma), log_snr, atol=1e-3, rtol=1e-4)
    assert_close(alpha + sigma if kind == "flow" else alpha**2 + sigma**2, torch.ones(37))


def test_flow_at_time_t_is_a_straight_line():
    t = torch.linspace(0.05, 0.95, 19)
    alpha, sigma = schedule.alpha_sigma(schedule.log_snr(t, "flow"), "flow")
    assert_close(alpha, 1 - t)
    assert_close(sigma, t)


def test_shift_makes_a_larger_grid_s_mean_as_noisy():
    """Averaging s×s cells divides the noise's variance by s²: with k = 1 the averages have the base
    grid's SNR."""
    shift = schedule.size_shift(14.0, 7.0, 1.0)
    assert shift == pytest.approx(math.log(4))
    t = torch.tensor(0.4)
    assert_close(schedule.log_snr(t, "cosine", shift) + math.log(4), schedule.log_snr(t, "cosine"))
    assert schedule.size_shift(7.0, 7.0, 1.0) == 0 and schedule.size_shift(14.0, 7.0, 0.0) == 0


@pytest.mark.parametrize(("kind", "noise_schedule"), PAIRS)
def test_prediction_and_target_are_inverse(kind, noise_schedule):
    data, noise = torch.randn(6, 2, 3, 3), torch.randn(6, 2, 3, 3)
    log_snr = torch.linspace(-6, 6, 6)
    alpha, sigma = (
        part.view(-1, 1, 1, 1) for part in schedule.alpha_sigma(log_snr, noise_schedule)
    )
    wanted = objective.target(kind, data, noise, alpha, sigma)
    back = objective.to_data_and_noise(kind, alpha * data + sigma * noise, wanted, alpha, sigma)
    assert_close(back[0], data, atol=1e-3, rtol=1e-3)
    assert_close(back[1], noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("weighting", "of_data"),
    [("min_snr", lambda snr: snr.clamp(max=5)), ("soft_min_snr", lambda snr: 5 * snr / (snr + 5))],
)
@pytest.mark.parametrize(("kind", "noise_schedule"), PAIRS)
def test_weights_of_the_error_of_the_data_are_alike_under_every_objective(
    kind, noise_schedule, weighting, of_data
):
    """weight · |prediction error|² must be min(SNR, 5)·|x₀ error|², or its smooth form."""
    log_snr = torch.linspace(-4, 4, 9)
    alpha, sigma = schedule.alpha_sigma(log_snr, noise_schedule)
    x, wrong = torch.randn(9), torch.randn(9)
    true = objective.to_data_and_noise(kind, x, torch.zeros(9), alpha, sigma)[0]
    data_error = objective.to_data_and_noise(kind, x, wrong, alpha, sigma)[0] - true
    weighted = objective.weight(kind, weighting, log_snr, sigma) * wrong**2
    assert_close(weighted, of_data(log_snr.exp()) * data_error**2, atol=1e-5, rtol=1e-4)


def gaussian_denoiser(mean: float, std: float, kind: str, log_snrs):
    """The exact posterior mean of x₀ ~ N(mean, std²) given x = α·x₀ + σ·ε."""

    def denoise(x, step):
        alpha, sigma = schedule.alpha_sigma(log_snrs[step], kind)
        gain = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        data = mean + gain * (x - alpha * mean)
        return data, (x - alpha * data) / sigma

    return denoise


@pytest.mark.parametrize("solver", sorted(solvers.SOLVERS))
@pytest.mark.parametrize("kind", KINDS)
def test_solvers_sample_a_gaussian(solver, kind):
    torch.manual_seed(0)
    noise = torch.randn(20000)
    log_snrs = schedule.log_snr(solvers.time_steps(200), kind)
    denoise = gaussian_denoiser(1.5, 0.5, kind, log_snrs)
    samples = solvers.SOLVERS[solver](denoise, noise, log_snrs, kind)
    assert float(samples.mean()) == pytest.approx(1.5, abs=0.03)
    assert float(samples.std()) == pytest.approx(0.5, rel=0.05)


def test_second_order_needs_fewer_steps():
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    exact, log_snrs = 1.5 + 0.5 * noise, schedule.log_snr(solvers.time_steps(15), "cosine")
    denoise = gaussian_denoiser(1.5, 0.5, "cosine", log_snrs)
    errors = {
        name: float((solve(denoise, noise, log_snrs, "cosine") - exact).square().mean())
        for name, solve in solvers.SOLVERS.items()
    }
    assert errors["dpmpp_2m"] < 0.5 * errors["ddim"]
    assert errors["heun"] < 0.1 * errors["euler"]


@pytest.mark.parametrize("kind", KINDS)
def test_heun_s_error_falls_with_the_square_of_the_steps(kind):
    """Against Euler's with the steps.

    Both end with one denoising, whose error does not fall: it is left out.
    """
    noise = torch.randn(1000, dtype=torch.float64)

    ends = torch.tensor([-6.0, 4.0], dtype=torch.float64)
    # Along the ODE's exact path, the number of standard deviations from the mean stays the same.
    alpha, sigma = schedule.alpha_sigma(ends, kind)
    mean, std = alpha * 1.5, (alpha**2 * 0.5**2 + sigma**2).sqrt()
    end = mean[1] + std[1] * (noise - mean[0]) / std[0]
    exact, _ = gaussian_denoiser(1.5, 0.5, kind, ends)(end, 1)

    def error(solve, steps):
        log_snrs = torch.linspace(-6, 4, steps + 1, dtype=torch.float64)
        denoise = gaussian_denoiser(1.5, 0.5, kind, log_snrs)
        return float((solve(denoise, noise, log_snrs, kind) - exact).abs().max())

    assert error(solvers.euler, 80) == pytest.approx(error(solvers.euler, 160) * 2, rel=0.15)
    assert error(solvers.heun, 80) == pytest.approx(error(solvers.heun, 160) * 4, rel=0.25)


def test_euler_of_the_flow_is_ddim():
    noise, log_snrs = torch.randn(100), schedule.log_snr(solvers.time_steps(7), "flow")
    denoise = gaussian_denoiser(1.5, 0.5, "flow", log_snrs)
    assert_close(
        solvers.euler(denoise, noise, log_snrs, "flow"),
        solvers.ddim(denoise, noise, log_snrs, "flow"),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_fresh_noise_keeps_the_marginals(kind, eta):
    """After every step x is distributed as α·x₀ + σ·ε is, and with η = 1 forgets the noise it came
    from. Each step but the last has fresh noise of its own."""
    torch.manual_seed(0)
    noise, mean, std = torch.randn(40000), 1.5, 0.5
    log_snrs, seen, fresh_steps = schedule.log_snr(solvers.time_steps(100), kind), [], []
    denoise = gaussian_denoiser(mean, std, kind, log_snrs)

    def watched(x, step):
        seen.append((x, step))
        return denoise(x, step)

    def fresh(step):
        fresh_steps.append(step)
        return torch.randn(40000)

    out = solvers.ddim(watched, noise, log_snrs, kind, eta, fresh)
    assert fresh_steps == list(range(99))
    for x, step in seen[20::20]:
        alpha, sigma = schedule.alpha_sigma(log_snrs[step], kind)
        assert float(x.mean()) == pytest.approx(float(alpha) * mean, abs=0.03)
        assert float(x.std()) == pytest.approx(
            float((alpha**2 * std**2 + sigma**2).sqrt()), rel=0.05
        )
    assert (abs(float(torch.corrcoef(torch.stack([out, noise]))[0, 1])) < 0.1) == (eta == 1)


def test_one_step_is_one_denoising():
    calls = []

    def denoise(x, step):
        calls.append(step)
        return x * 0 + 7.0, x

    log_snrs = schedule.log_snr(solvers.time_steps(1), "cosine")
    for solve in solvers.SOLVERS.values():
        assert (solve(denoise, torch.randn(3), log_snrs, "cosine") == 7).all()
    assert calls == [0] * len(solvers.SOLVERS)


def errors(multiscale, wrong, weighting="uniform"):
    """Both errors of a model that is off by ``wrong`` in its prediction of the noise."""
    data, noise = torch.zeros_like(wrong), torch.zeros_like(wrong)
    diffusion = DiffusionConfig(objective="epsilon", multiscale=multiscale, weighting=weighting)
    side = (wrong.shape[2] * wrong.shape[3]) ** 0.5
    levels = noise_levels(diffusion, 4.0, side, torch.full((len(wrong),), 0.3))
    return denoising_loss(lambda *_: wrong, diffusion, levels, data, torch.zeros(len(wrong)), noise)


def test_the_error_at_one_scale_is_the_plain_one():
    wrong = torch.randn(3, 2, 5, 4)
    weighted, plain = errors(0, wrong)
    assert_close(weighted, wrong.square().mean((1, 2, 3)))
    assert torch.equal(weighted, plain)


def test_the_error_at_three_scales_by_hand():
    """A grid of 2×4: its halves are 1 and 3, 0 and 2, …; the plain error stays the record's."""
    wrong = torch.tensor([[[[1.0, 3.0, 0.0, 2.0], [1.0, 3.0, -4.0, 2.0]]]])
    weighted, plain = errors(2, wrong)
    assert_close(plain, torch.tensor([44.0 / 8]))
    # Means of 2×2 are 2 and 0; that of 4×4, of which the grid has 2×4, is 1.
    assert_close(weighted, torch.tensor([44.0 / 8 + 2 * (4 + 0) / 2 + 4 * 1.0]))


def test_squares_over_the_edge_are_means_of_what_they_hold():
    wrong = torch.tensor([[[[1.0, 3.0, 5.0]]]])
    assert_close(errors(1, wrong)[0], torch.tensor([35 / 3 + 2 * (4 + 25) / 2]))
    one = torch.tensor([[[[3.0]]]])
    assert_close(errors(1, one)[0], torch.tensor([9.0 + 2 * 9]))


def test_scales_are_weighted_over_time_too_and_by_sample():
    wrong = torch.randn(4, 2, 5, 4)
    at_once = errors(2, wrong, "min_snr")[0]
    assert_close(torch.cat([errors(2, part, "min_snr")[0] for part in wrong.split(1)]), at_once)
    ratio = errors(0, wrong, "min_snr")[0] / errors(0, wrong)[0]
    assert_close(at_once, errors(2, wrong)[0] * ratio)
