"""From training to pictures on a GPU: every path, on the stand-in of tests/stand_in.py."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r2id import Pipeline
from r2id.app.actions import Actions
from r2id.diffusion.solvers import SOLVERS
from r2id.evaluation.noise_shift import measure_noise_shift
from r2id.evaluation.run import evaluate
from r2id.images import save_png
from r2id.sampling import Sampler
from r2id.sampling.reconstruction import reconstruct_file
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.stand_in import Counts, stand_in_gpu
from tests.training.configs import assert_same, r2id_config, riae_config

SHORT = ("train.batch=8", "train.log_every=1", "train.precision=bfloat16", "data.train_split=test")
SAME_BITS = ("train.steps=2", "train.save_every=1", "train.deterministic=true")


def test_a_resumed_training_equals_an_uninterrupted_one(
    digits: Path, tmp_path: Path, counts: Counts
) -> None:
    for run in ("whole", "parts"):
        train(riae_config(digits, tmp_path / run, *SHORT, *SAME_BITS))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000002")
    train(riae_config(digits, tmp_path / "parts", *SHORT, *SAME_BITS))
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_both_stages_follow_each_other(digits: Path, tmp_path: Path, counts: Counts) -> None:
    train(riae_config(digits, tmp_path / "riae", *SHORT, "train.steps=2"))
    encode(tmp_path / "riae", digits, tmp_path / "latents")
    result = train(
        r2id_config(
            digits,
            tmp_path / "riae",
            tmp_path / "r2id",
            f"data.latents={tmp_path}/latents",
            *SHORT,
            "train.steps=2",
            "sample.steps=2",
        )
    )
    assert result["step"] == 2 and result["loss"] == result["loss"]
    drawn = Sampler.load(tmp_path / "r2id", "cuda").sample(
        torch.tensor([3]), torch.tensor([0]), (8, 8)
    )
    assert drawn.shape == (1, 1, 8, 8) and drawn.is_cpu


SAMPLING = {
    **{solver: {"solver": solver} for solver in SOLVERS},
    "fresh noise": {"solver": "ddim", "eta": 0.7},
    "guidance interval": {"guidance": 3.0, "guidance_interval": (0.2, 0.8)},
    "no guidance": {"guidance": 1.0},
    "autoguidance": {"guidance": 1.5, "autoguidance": 0.5},
}


@pytest.mark.parametrize("settings", SAMPLING.values(), ids=SAMPLING)
def test_samples_are_those_of_a_cpu(r2id_run: Path, settings: dict[str, object]) -> None:
    given = torch.tensor([3, -1, 7]), torch.tensor([5, 6, 7]), (12, 9)
    options = {"steps": 4, **settings}
    wanted = Sampler.load(r2id_run).sample(*given, **options)
    with stand_in_gpu():
        found = Sampler.load(r2id_run, "cuda").sample(*given, **options)
    # The model computes in bfloat16, and its attention by another kernel.
    assert (found - wanted).abs().mean() < 0.02


@pytest.mark.slow
def test_models_are_used(
    r2id_run: Path, digits: Path, classifier_file: Path, tmp_path: Path, counts: Counts
) -> None:
    save_png(torch.rand(1, 20, 14) * 2 - 1, tmp_path / "picture.png")
    window = (2, 1, 9, 8)
    sizes = [(20, 14), (31, 22)]
    found = reconstruct_file(
        r2id_run, tmp_path / "picture.png", tmp_path / "out", sizes, window=window, device="cuda"
    )
    assert len(found["files"]) == 2
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / classifier_file.name).write_bytes(classifier_file.read_bytes())
    metrics = evaluate(
        r2id_run, digits, tmp_path / "report", count=8, invariance=4, steps=2, device="cuda"
    )
    assert metrics["invariance"]
    shift = measure_noise_shift(r2id_run, digits, tmp_path / "shift", images=8, device="cuda")
    assert shift["k"] == shift["k"]


def test_the_pipeline_draws_and_edits(r2id_run: Path, counts: Counts) -> None:
    pipe = Pipeline.from_pretrained(r2id_run)
    assert pipe.codec.device.type == "cuda"
    picture = pipe(3, size=(8, 8), seeds=4, steps=2)[0]
    assert pipe.upscale(picture, (16, 16)).size == (16, 16)
    assert pipe.vary(picture, 0.5, steps=2).size == (8, 8)
    assert len(pipe.interpolate(0, 1, count=2, steps=2)) == 2


def test_the_page_draws_and_zooms(r2id_run: Path, counts: Counts) -> None:
    page = Actions(Pipeline.from_pretrained(r2id_run))
    request = replace(page.first_request, steps=2)
    assert page.draw(request, (8, 8)).size == (8, 8)
    assert max(page.zoom(request, (8, 8), 2.0, (0.5, 0.5)).size) == 512
