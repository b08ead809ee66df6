"""Sampling: sizes, seeds, guidance, and files."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from r2id.checkpoints import Checkpoint
from r2id.config import change
from r2id.diffusion import schedule, solvers
from r2id.errors import InputError
from r2id.models.r2id import R2ID
from r2id.progress import FILE_VARIABLE
from r2id.sampling import sampler as sampler_module
from r2id.sampling.conditions import choose_labels, spread_labels
from r2id.sampling.grids import draw_grids, output_files
from r2id.sampling.guidance import Guidance, conditions_for
from r2id.sampling.reconstruction import reconstruct_file
from r2id.sampling.sampler import Sampler


@pytest.mark.parametrize("size", [(8, 8), (12, 8), (1, 1), (5, 31), (40, 40)])
def test_any_size(sampler, size):
    images = sampler.sample(torch.tensor([0, 9, -1]), torch.arange(3), size)
    assert images.shape == (3, 1, *size) and images.abs().max() <= 1


def test_a_picture_depends_on_its_seed_and_label_alone(sampler):
    labels, seeds = torch.arange(70) % 10, torch.arange(70)
    for size, grid in [((8, 8), None), ((9, 13), (5, 7))]:
        together = sampler.sample(labels, seeds, size, grid=grid)
        for some in (slice(2, 3), slice(60, 70), slice(None, None, 7)):
            assert torch.equal(
                sampler.sample(labels[some], seeds[some], size, grid=grid), together[some]
            )
        others = sampler.sample(labels[:4], seeds[:4] + 100, size, grid=grid)
        assert (others - together[:4]).abs().flatten(1).amax(1).min() > 1e-3


def test_the_latent_grid_stays_within_what_was_trained(sampler):
    assert sampler.areas == (16, 16) and sampler.base_side == 4.0
    assert sampler.grid_for((8, 8)) == (4, 4) and sampler.grid_for((64, 64)) == (4, 4)
    assert sampler.grid_for((12, 8)) == (4, 4) and sampler.grid_for((1, 1)) == (4, 4)
    wider = replace(sampler, areas=(9, 40), ratios=(0.5, 2.0))
    assert (
        wider.grid_for((12, 8)) == (6, 4)
        and wider.grid_for((16, 8)) == (8, 4)
        and wider.grid_for((100, 2)) == (9, 4)
    )
    height, width = wider.grid_for((90, 60))
    assert height / width == pytest.approx(1.5, rel=0.15) and 35 <= height * width <= 45


def test_guidance_scales(sampler):
    def draw(guidance):
        return sampler.sample(torch.tensor([2]), torch.tensor([5]), (8, 8), guidance=guidance)

    empty = sampler.sample(torch.tensor([-1]), torch.tensor([5]), (8, 8), guidance=1.0)
    torch.testing.assert_close(draw(0.0), empty)
    assert not torch.equal(draw(1.0), draw(3.0))


def test_autoguidance_moves_away_from_what_the_guide_predicts(sampler):
    """Of the conditional prediction, whatever the guidance beside it."""
    model, guide = (copy.deepcopy(network).float() for network in (sampler.model, sampler.guide))
    x, times = torch.randn(2, model.channels, 3, 4), torch.tensor([0.4])
    labels = torch.tensor([3, -1])
    with torch.no_grad():
        unconditional, conditional = model.predict(x, times, conditions_for(labels, 3.0))
        early = guide(x, times, labels)
        for scale in (1.0, 3.0):
            settings = change(sampler.defaults, {"guidance": scale, "autoguidance": 2.0})
            predict = Guidance(model, guide, settings, labels).predict
            found = predict(x, 0.5, 0.4)
            wanted = unconditional + scale * (conditional - unconditional)
            torch.testing.assert_close(found, wanted + 2.0 * (conditional - early))
    assert not torch.equal(conditional, early)


def test_autoguidance_with_and_without_conditions(sampler):
    def draw(**settings):
        return sampler.sample(torch.tensor([2]), torch.tensor([5]), (8, 8), steps=4, **settings)

    for guidance in (0.0, 1.0, 3.0):
        plain = draw(guidance=guidance, autoguidance=0.0)
        guided = draw(guidance=guidance, autoguidance=1.0)
        assert guided.isfinite().all() and not torch.equal(guided, plain)
        nowhere = draw(guidance=1.0, autoguidance=1.0, guidance_interval=(0.8, 0.9))
        assert torch.equal(nowhere, draw(guidance=1.0, autoguidance=0.0)), "4 steps: 1, ¾, ½, ¼"


def test_autoguidance_needs_a_guide(sampler):
    alone = replace(sampler, guide=None)
    given = torch.tensor([2]), torch.tensor([5]), (8, 8)
    plain = alone.sample(*given, autoguidance=0.0)
    assert torch.equal(plain, sampler.sample(*given, autoguidance=0.0))
    with pytest.raises(InputError, match=r"autoguidance 0\.5.*train\.guide_after.*must be 0"):
        alone.sample(*given, autoguidance=0.5)


def test_guidance_within_an_interval_alone(sampler):
    exact = replace(
        sampler,
        model=copy.deepcopy(sampler.model).float(),
        bfloat16=False,
        codec=replace(sampler.codec, bfloat16=False),
        defaults=change(sampler.defaults, {"autoguidance": 0.0}),
    )

    def draw(guidance, interval=None):
        return exact.sample(
            torch.tensor([2]),
            torch.tensor([5]),
            (8, 8),
            steps=4,
            guidance=guidance,
            guidance_interval=interval,
        )

    assert torch.equal(draw(3.0, (0.0, 1.0)), draw(3.0)), "steps of 4 are at times 1, ¾, ½ and ¼"
    assert torch.equal(draw(3.0, (0.8, 0.9)), draw(1.0)), "conditional elsewhere"
    assert torch.equal(draw(0.0, (0.8, 0.9)), draw(0.0)), (
        "but not where conditions are left out altogether"
    )
    found = [draw(3.0, interval) for interval in ((0.0, 0.6), (0.6, 1.0), (0.2, 0.3))]
    assert not any(
        torch.equal(one, other) for one, other in [found[:2], found[1:], (found[0], draw(1.0))]
    )
    assert torch.equal(draw(3.0, (0.4, 0.9)), draw(3.0, (0.45, 0.8))), "both hold the times ½ and ¾"
    assert torch.equal(draw(3.0, (0.4, 0.9)), draw(3.0, (0.5, 0.75))), "and so do their ends"
    # Shifted so far that all these times have the largest noise.
    diffusion = change(exact.diffusion, {"shift_exponent": 1.0})
    exact = replace(exact, diffusion=diffusion, base_side=1e-2)
    assert torch.equal(draw(3.0, (0.3, 0.4)), draw(1.0)), "none of the steps is at those times"


def test_solvers_and_grids_by_name(sampler, monkeypatch):
    def draw(**settings):
        return sampler.sample(torch.tensor([1]), torch.tensor([0]), (8, 8), grid=(2, 6), **settings)

    used, names = [], list(solvers.SOLVERS)
    for name, solve in list(solvers.SOLVERS.items()):

        def noted(*given, name=name, solve=solve):
            used.append(name)
            return solve(*given)

        monkeypatch.setitem(solvers.SOLVERS, name, noted)
    images = [
        draw(solver="ddim"),
        draw(solver="ddim", eta=1.0),
        *(draw(solver=name) for name in names),
    ]
    assert used == ["ddim", *names], "with eta, ddim is called by itself"
    assert all(image.isfinite().all() for image in images)
    assert torch.equal(images[1], draw(eta=1.0)), "eta alone is of ddim"
    assert torch.equal(images[1], draw(solver="ddim", eta=1.0)) and not torch.equal(
        images[0], images[1]
    )


def test_each_step_of_ancestral_sampling_has_noise_of_its_own(sampler, monkeypatch):
    """Neither another step's nor that which sampling begins with."""
    keys, plain = [], sampler_module.noise_field
    monkeypatch.setattr(
        sampler_module,
        "noise_field",
        lambda rng_keys, *given: keys.append(rng_keys[:2]) or plain(rng_keys, *given),
    )
    sampler.latents(torch.tensor([1, 1]), torch.tensor([0, 5]), (4, 4), steps=5, eta=1.0)
    assert len(keys) == 5 and torch.cat(keys).unique().numel() == 2 * 5


def test_an_adjusted_estimate_moves_the_noise_with_it(sampler, monkeypatch):
    """x = α·x₀ + σ·ε stays as it is: another x₀ makes another ε."""
    monkeypatch.setitem(solvers.SOLVERS, "ddim", lambda denoise, x, *_: denoise(x, 0)[1])
    codec, kind = sampler.codec, sampler.diffusion.schedule
    noise, start, better = torch.randn(3, 2, codec.latent_channels, 4, 4)
    found = sampler.latents(
        torch.tensor([1, 2]),
        torch.arange(2),
        (4, 4),
        noise=noise,
        start=start,
        strength=0.5,
        adjust=lambda rows, _: better[rows],
        steps=1,
        solver="ddim",
    )
    log_snr = schedule.log_snr(torch.tensor(0.5), kind, sampler.shift((4, 4)))
    alpha, sigma = schedule.alpha_sigma(log_snr, kind)
    moved = alpha / sigma * (codec.normalise(start) - codec.normalise(better))
    torch.testing.assert_close(codec.normalise(found), noise + moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("bfloat16_weights", torch.bfloat16),
    ],
)
def test_samples_are_computed_in_the_format_of_training(r2id_run, precision, dtype):
    checkpoint = Checkpoint.open(r2id_run)
    checkpoint.meta.config["train"]["precision"] = precision
    sampler = Sampler.load(checkpoint)
    assert sampler.bfloat16 == (dtype == torch.bfloat16)
    for network in (sampler.model, sampler.guide):
        assert dtype in {parameter.dtype for parameter in network.parameters()}


@pytest.mark.parametrize(
    ("grid", "size", "native"),
    [
        ((6, 4), (12, 8), (12, 8)),  # the codec's grid of that size
        ((4, 4), (64, 40), (8, 8)),  # that of the training images
        ((3, 6), (8, 8), None),  # neither
    ],
)
def test_the_native_size_of_samples(sampler, grid, size, native):
    latents = torch.zeros(1, sampler.codec.latent_channels, *grid)
    assert sampler.codec.image == (8, 8) and sampler.native_size(latents, size) == native


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.5, "solver": "heun"}, r"eta = 0\.5.*heun"),
        ({"guidance_interval": (0.5, 0.5)}, r"0\.5"),
        ({"guidance_interval": (0.5, 2.0)}, "guidance_interval"),
        ({"solver": "rk4"}, "solver"),
    ],
)
def test_settings_that_do_not_go(sampler, settings, message):
    with pytest.raises(InputError, match=message):
        sampler.sample(torch.tensor([1]), torch.tensor([0]), (8, 8), **settings)


def test_guidance_needs_a_condition(sampler):
    unconditional = R2ID(
        sampler.model.config.model_copy(update={"condition": "none"}),
        sampler.codec.latent_channels,
        0,
    )
    free = replace(sampler, model=unconditional.eval())
    with pytest.raises(InputError, match=r"guidance 3\.0"):
        free.sample(torch.tensor([-1]), torch.tensor([0]), (8, 8), guidance=3.0)
    assert (
        free.sample(torch.tensor([-1]), torch.tensor([0]), (8, 8), guidance=1.0, steps=1)
        .isfinite()
        .all()
    )


def test_labels():
    assert choose_labels((), 5, 3).tolist() == [0, 1, 2, 0, 1]
    assert choose_labels((2,), 2, 3).tolist() == [2, 2]
    assert choose_labels((), 2, 0).tolist() == [-1, -1]
    assert choose_labels(("c", 0), 3, 3, ("a", "b", "c")).tolist() == [2, 0, 2]
    with pytest.raises(InputError, match=r"label 3: .*2"):
        choose_labels((3,), 1, 3)
    with pytest.raises(InputError, match=r"label 0"):
        choose_labels((0,), 1, 0)
    with pytest.raises(InputError, match=r"3 labels.*2"):
        choose_labels((0, 1, 2), 2, 3)


@pytest.mark.parametrize(
    ("count", "classes", "labels"),
    [(3, 10, [0, 3, 6]), (3, 3, [0, 1, 2]), (5, 3, [0, 1, 2, 0, 1]), (2, 0, [-1, -1])],
)
def test_labels_that_stand_for_all_classes(count, classes, labels):
    assert spread_labels(count, classes).tolist() == labels


def test_grids_are_written_once(r2id_run, tmp_path, monkeypatch):
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "progress.json"))
    sizes = [(8, 8), (12, 6), (8, 8)]  # one of them twice
    result = draw_grids(r2id_run, tmp_path / "out", sizes, count=20)
    progress = json.loads((tmp_path / "progress.json").read_text())
    assert progress["done"] == progress["total"] == 2 * 2 * 4, "batches, sizes and steps"
    assert [file.rsplit("/", 1)[1] for file in result["files"]] == ["8x8.png", "12x6.png"]
    with Image.open(result["files"][1]) as picture:
        assert picture.size == (10 * (6 + 2), 2 * (12 + 2))
    before = (tmp_path / "out" / "8x8.png").read_bytes()
    with pytest.raises(InputError, match=r"8x8\.png"):
        draw_grids(r2id_run, tmp_path / "out", [(8, 8)], count=20)
    draw_grids(r2id_run, tmp_path / "out", [(8, 8)], count=20, overwrite=True)
    assert (tmp_path / "out" / "8x8.png").read_bytes() == before


def test_reconstruction_of_a_picture_file(riae_run, tmp_path):
    Image.radial_gradient("L").resize((21, 13)).save(tmp_path / "in.png")
    sizes = [(13, 21), (30, 50), (13, 21)]
    result = reconstruct_file(riae_run, tmp_path / "in.png", tmp_path / "out", sizes)
    assert len(result["files"]) == 2
    assert 0 < result["psnr"] < 60
    with Image.open(tmp_path / "out" / "30x50.png") as picture:
        assert picture.size == (50, 30)


def test_a_window_of_a_reconstruction_is_cut_from_the_whole(riae_run, tmp_path):
    Image.radial_gradient("L").resize((21, 13)).save(tmp_path / "in.png")
    reconstruct_file(riae_run, tmp_path / "in.png", tmp_path / "whole.png", [(30, 50)])
    reconstruct_file(
        riae_run, tmp_path / "in.png", tmp_path / "part.png", [(30, 50)], window=(3, 11, 20, 50)
    )
    with Image.open(tmp_path / "whole.png") as whole, Image.open(tmp_path / "part.png") as part:
        assert part.size == (39, 17)
        difference = np.asarray(whole.crop((11, 3, 50, 20)), dtype=int) - np.asarray(
            part, dtype=int
        )
    assert np.abs(difference).max() <= 1


def test_where_output_may_go(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in ("folder.png", "exists.d/1x1.png", "exists.gif"):
        (tmp_path / folder).mkdir(parents=True)
    assert output_files(tmp_path / "new", ["8x8", "8x8", "9x9"], False) == [
        tmp_path / "new/8x8.png",
        tmp_path / "new/9x9.png",
    ]
    for out, names, message in [
        (tmp_path / "a.png", ["1x1", "2x2"], r"a\.png: .*2"),
        (tmp_path / "a.jpg", ["1x1"], r"a\.jpg: .*\.png"),
        (tmp_path / "file", ["1x1"], "file"),
        (tmp_path / "folder.png", ["1x1", "2x2"], r"folder\.png: is a folder"),
        (tmp_path / "exists.d", ["1x1"], r"1x1\.png: is a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            output_files(out, names, True)
    for out in ("runs/g1.5", "exists.d", "exists.gif"):
        assert output_files(tmp_path / out, ["8x8"], False) == [tmp_path / out / "8x8.png"]


def test_samples_are_latents_rendered(sampler):
    labels, seeds = torch.arange(9), torch.arange(9)
    latents = sampler.latents(labels, seeds, sampler.grid_for((10, 6)))
    assert torch.equal(sampler.render(latents, (10, 6)), sampler.sample(labels, seeds, (10, 6)))
    assert torch.equal(
        sampler.latents(labels[3:5], seeds[3:5], sampler.grid_for((10, 6))), latents[3:5]
    )
