"""A model exported with an RIAE whose decoder was trained on, after R2ID was trained."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r2id.checkpoints import Checkpoint, pretrained
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler
from r2id.training.loop import train
from tests.training.configs import riae_config


@pytest.fixture(scope="module")
def train_on(digits, riae_run, tmp_path_factory):
    """Train the RIAE on for a few steps."""

    def run(*overrides: str, begin: bool = True) -> Path:
        folder = tmp_path_factory.mktemp("finetuned") / "run"
        settings = "train.precision=auto", "train.steps=4", *overrides  # the first one's precision
        start = [f"init_from={riae_run}"] if begin else []
        train(riae_config(digits, folder, *start, *settings))
        return folder

    return run


@pytest.fixture(scope="module")
def finetuned(train_on) -> Path:
    return train_on("loss.freeze_encoder=true", "train.ema=0.5")


def draw(sampler: Sampler) -> torch.Tensor:
    return sampler.sample(torch.tensor([3, 7]), torch.arange(2), (8, 8))


@pytest.mark.parametrize("other_images", [False, True])
def test_the_same_latents_are_decoded_by_the_other(
    r2id, r2id_run: Path, train_on, finetuned: Path, other_images: bool, tmp_path: Path
) -> None:
    """Be it trained on other images, whose latents have another mean and deviation."""
    if other_images:
        finetuned = train_on("loss.freeze_encoder=true", "data.train_split=test")
    file = tmp_path / "model.safetensors"
    code, said, errors = r2id(
        "checkpoint", "export", r2id_run, "--riae", finetuned, "--out", file, "--steps", 3
    )
    assert code == 0 and f"with {finetuned}" in said.replace("\n", ""), errors
    own, exported = Sampler.load(r2id_run), Sampler.load(file)
    other = Codec.load(finetuned)
    assert torch.equal(own.codec.mean, other.mean) != other_images
    expected = replace(own, codec=replace(other, mean=own.codec.mean, std=own.codec.std))
    defaults = replace(expected, defaults=exported.defaults)
    assert torch.equal(draw(exported), draw(defaults))
    assert not torch.equal(draw(exported), draw(replace(own, defaults=exported.defaults)))
    content, run = pretrained.read(file), Checkpoint.open(r2id_run)
    assert content.identity != run.identity
    code, _, errors = r2id(  # the latents are the same, and so it can guide
        "checkpoint", "export", r2id_run, "--guide", file, "--out", tmp_path / "guided.safetensors"
    )
    assert code == 0, errors
    same = content.codec().identity == Checkpoint.open(finetuned).identity
    assert same != other_images


def test_a_published_folder_takes_no_report_of_the_other_decoder(
    r2id, digits, classifier_file, r2id_run: Path, finetuned: Path, tmp_path: Path
) -> None:
    def publish(folder: str, *options: object) -> tuple[int, str, str]:
        export = "checkpoint", "export", r2id_run, "--out", tmp_path / folder
        return r2id(*export, "--riae", finetuned, *options)

    report = tmp_path / "report"
    report.mkdir()
    (report / "classifier.safetensors").write_bytes(classifier_file.read_bytes())
    options = "--shards", digits, "--out", report, "--count", 8
    assert r2id("evaluate", r2id_run, *options)[0] == 0
    code, _, errors = publish("refused", "--report", report)
    assert code == 2 and "measured with another model" in errors
    code, _, errors = publish("published")
    assert code == 0, errors
    assert "| RIAE | 4 |" in (tmp_path / "published" / "README.md").read_text()


def test_what_cannot_decode_is_refused(
    r2id, train_on, riae_run: Path, r2id_run: Path, finetuned: Path, tmp_path: Path
) -> None:
    whole = train_on()
    wider = train_on("riae.width=20", begin=False)
    refused = {
        (r2id_run, whole): r"--riae .*: has another encoder than .*: .*; must be trained on from ",
        (r2id_run, wider): r"--riae .*: has riae\.width = 20; must have \d+, as ",
        (r2id_run, tmp_path / "none"): "none: no such folder or file",
        (riae_run, finetuned): "--riae: goes with an R2ID of latents, and .* is none",
    }
    for (model, riae), message in refused.items():
        out = tmp_path / "refused.safetensors"
        code, _, errors = r2id("checkpoint", "export", model, "--riae", riae, "--out", out)
        assert code == 2 and not out.exists(), errors
        assert re.search(message, errors.splitlines()[-1]), errors
