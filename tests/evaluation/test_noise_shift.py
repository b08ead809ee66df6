"""Measuring the noise shift finds known exponents, and an applied one is used by the sampler."""

import json
import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from r2id.checkpoints import Checkpoint
from r2id.config import R2idConfig
from r2id.errors import InputError, WorkError
from r2id.evaluation.errors_by_noise import data_error
from r2id.evaluation.noise_shift import (
    LOG_SNRS,
    choose_sizes,
    find_displacement,
    fit_exponent,
    measure_curve,
    measure_noise_shift,
)
from r2id.sampling import noise_shift
from r2id.sampling.sampler import Sampler

SIDES = (4, 8, 12)
SIGNAL = 1 / (1 + math.exp(-1))  # α² at a logSNR of 1


class Exact(nn.Module):
    """The optimal denoiser E[x₀ | x] of standard normal latents, whose shift is known.

    They are independent in every cell (k = 0), or a 4×4 grid enlarged by repetition (k = 1).
    """

    config, classes, condition_shape = R2idConfig(condition="none"), 0, ()

    def __init__(self, repeated: bool) -> None:
        super().__init__()
        self.repeated = repeated

    def forward(self, x, alpha_bar, condition):
        side, alpha_bar = x.shape[2], alpha_bar.view(-1, 1, 1, 1)
        seen = F.adaptive_avg_pool2d(x, 4) if self.repeated else x
        noise = (1 - alpha_bar) * ((4 / side) ** 2 if self.repeated else 1)
        data = alpha_bar.sqrt() / (alpha_bar + noise) * seen
        return F.interpolate(data, size=(side, side)) if self.repeated else data


def exact(sampler, repeated):
    """The sampler of an exact denoiser on data of a known shift, and that data on three grids."""
    torch.manual_seed(0)
    channels = sampler.codec.latent_channels
    plain = replace(sampler.codec, mean=torch.zeros(channels), std=torch.ones(channels))
    labels = torch.zeros(200, dtype=torch.int64)
    field = torch.randn(200, channels, 4, 4)
    data = {
        side: F.interpolate(field, size=(side, side))
        if repeated
        else torch.randn(200, channels, side, side)
        for side in SIDES
    }
    diffusion = sampler.diffusion.model_copy(update={"objective": "x0", "schedule": "cosine"})
    return (
        replace(sampler, model=Exact(repeated), codec=plain, diffusion=diffusion, bfloat16=False),
        {(side, side): [(latents, labels)] for side, latents in data.items()},
    )


@pytest.mark.parametrize("base", SIDES)
@pytest.mark.parametrize(("repeated", "k"), [(False, 0.0), (True, 1.0)])
def test_a_known_exponent_is_found(sampler, repeated, k, base):
    known, data = exact(sampler, repeated)
    curves = {grid: measure_curve(known, latents) for grid, latents in data.items()}
    fit = fit_exponent(curves, (base, base))
    assert fit.k == pytest.approx(k, abs=0.03) and fit.residual < 0.05
    assert max(fit.mismatches.values()) < 0.01 and fit.displacements[base, base] == pytest.approx(
        0, abs=1e-9
    )


@pytest.mark.parametrize(
    ("kind", "wanted"), [("epsilon", math.exp(-1)), ("x0", 0.0), ("v", SIGNAL * (1 - SIGNAL))]
)
def test_the_error_is_that_of_x0_under_every_objective(sampler, kind, wanted):
    """A prediction of 0 for x = σ·ε means an x₀ of σ·ε/α (ε), 0 (x₀) or α·σ·ε (v)."""

    class Silent(Exact):
        def forward(self, x, alpha_bar, condition):
            return torch.zeros_like(x)

    known, data = exact(sampler, False)
    diffusion = sampler.diffusion.model_copy(update={"objective": kind, "schedule": "cosine"})
    ((latents, labels),) = data[8, 8]
    silent = replace(known, model=Silent(False), diffusion=diffusion)
    found = data_error(silent, torch.zeros_like(latents), labels, 1.0)
    assert found.shape == (200,) and float(found.mean()) == pytest.approx(wanted, rel=0.03)


def test_a_curve_s_displacement_is_to_the_noisy_side():
    curve, moved = (torch.sigmoid(-torch.tensor(LOG_SNRS) - d) for d in (0.0, 1.3))
    assert find_displacement(curve.tolist(), moved.tolist())[0] == pytest.approx(1.3, abs=0.011)
    with pytest.raises(WorkError, match="8x8"):
        fit_exponent(
            {(4, 4): curve.tolist(), (8, 8): torch.linspace(3, 2, len(LOG_SNRS)).tolist()}, (4, 4)
        )


def test_grids_around_those_trained(sampler):
    assert choose_sizes(sampler) == {
        (3, 3): (6, 6),
        (4, 4): (8, 8),
        (5, 5): (10, 10),
        (6, 6): (12, 12),
    }
    wider = replace(sampler, areas=(4, 100))
    assert list(choose_sizes(wider)) == [(2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (10, 10)]


@pytest.fixture
def run(r2id_run, riae_run, tmp_path):
    """A copy of the run beside its RIAE, so that what is applied is applied to the copy alone."""
    shutil.copytree(riae_run, tmp_path / riae_run.parent.name / riae_run.name)
    return shutil.copytree(r2id_run, tmp_path / r2id_run.parent.name / r2id_run.name)


def test_what_is_applied_is_used_until_it_is_removed(run, digits, capsys):
    trained = Sampler.load(run).diffusion.shift_exponent
    found = measure_noise_shift(run, digits, images=40, seed=3)
    assert json.loads((run / "report" / "noise-shift.json").read_text()) == found
    assert (
        found["images"] == 40
        and found["seed"] == 3
        and found["checkpoint"] == Checkpoint.open(run).identity
    )
    assert list(found["grids"]) == ["3x3", "4x4", "5x5", "6x6"] and found["base"] == "4x4"
    assert [grid["trained"] for grid in found["grids"].values()] == [False, True, False, False]
    with Image.open(run / "report" / "noise-shift.png") as picture:
        assert picture.width > 500
    assert Sampler.load(run).diffusion.shift_exponent == trained, (
        "a measurement alone changes nothing"
    )
    for exponent in (0.0, 0.375):
        file = noise_shift.apply(Checkpoint.open(run), {**found, "k": exponent})
        capsys.readouterr()
        assert Sampler.load(run).diffusion.shift_exponent == exponent != trained
        assert f"{file}: noise shift exponent {exponent:.3f}" in capsys.readouterr().err
    noise_shift.apply(Checkpoint.open(run), {**found, "k": 0.375, "checkpoint": "0" * 64})
    assert Sampler.load(run).diffusion.shift_exponent == trained
    assert str(file) in capsys.readouterr().err
    for text in ("{", '{"k": 1.0}', json.dumps({**found, "k": -1.0}), "[]"):
        file.write_text(text)
        with pytest.raises(InputError, match=r"noise-shift\.json"):
            Sampler.load(run)
    with pytest.raises(WorkError, match=r"-0\.2"):
        noise_shift.apply(Checkpoint.open(run), {**found, "k": -0.2})


def test_mistakes(r2id_run, riae_run, digits, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "file"))):
        measure_noise_shift(r2id_run, digits, tmp_path / "file")
    with pytest.raises(InputError, match=re.escape(str(r2id_run))):
        measure_noise_shift(r2id_run, digits, r2id_run, apply=True)
    with pytest.raises(InputError, match="'riae'"):
        measure_noise_shift(riae_run, digits, tmp_path / "out")
    assert not (tmp_path / "out").exists()
