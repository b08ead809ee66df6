"""A model exported with the weights of another one as its guide."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2id.checkpoints import Checkpoint, pretrained
from r2id.checkpoints.export import export
from r2id.checkpoints.reading import list_checkpoints
from r2id.config import change, load_config
from r2id.errors import InputError
from r2id.sampling.sampler import Sampler
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_R2ID


@pytest.fixture(scope="module")
def train_r2id(digits, riae_run, latents, tmp_path_factory):
    """Train a small R2ID for twelve steps, with a checkpoint after six."""

    def run(*overrides: str, guide_after: float | None = 0.5) -> Path:
        folder = tmp_path_factory.mktemp("guided") / "run"
        settings = [
            *TINY_R2ID,
            f"run={folder}",
            f"data.shards={digits}",
            f"codec={riae_run}",
            f"data.latents={latents}",
            "train.steps=12",
            "train.save_every=6",
            *overrides,
        ]
        config = load_config(CONFIGS / "digits" / "r2id.toml", settings)
        train(change(config, {"train": {**config.train.model_dump(), "guide_after": guide_after}}))
        return folder

    return run


@pytest.fixture(scope="module")
def guided(train_r2id) -> Path:
    return train_r2id()


def test_an_earlier_checkpoint_is_the_guide_that_the_run_keeps(guided: Path, tmp_path) -> None:
    """It is bit for bit what a run with ``train.guide_after`` at its step has."""
    earlier, last = list_checkpoints(guided / "checkpoints")
    own, given, itself = (tmp_path / f"{name}.safetensors" for name in ("own", "given", "itself"))
    export(guided, own)
    export(guided, given, guide=earlier)
    export(guided, itself, guide=last)
    weights, of_given = load_file(own), load_file(given)
    assert weights.keys() == of_given.keys()
    assert all(torch.equal(value, of_given[name]) for name, value in weights.items())
    of_itself = load_file(itself)
    names = [name for name in of_itself if name.startswith("guide.")]
    assert all(torch.equal(of_itself[n], of_itself[n.removeprefix("guide.")]) for n in names)

    def draw(file: Path, autoguidance: float) -> torch.Tensor:
        labels = torch.tensor([3, 7]), torch.arange(2), (8, 8)
        return Sampler.load(file).sample(*labels, autoguidance=autoguidance)

    assert torch.equal(draw(given, 1.0), draw(own, 1.0))
    assert torch.equal(draw(itself, 1.0), draw(itself, 0.0)), "nothing to move away from"
    assert not torch.equal(draw(given, 1.0), draw(given, 0.0))


def test_a_model_without_a_guide_gets_one_and_its_defaults(
    r2id, train_r2id, guided: Path, tmp_path
) -> None:
    """A guide may also be another run, trained with another dropout and learning rate."""
    alone = train_r2id(
        "sample.autoguidance=0.0", "diffusion.condition_dropout=0.2", guide_after=None
    )
    with pytest.raises(InputError, match=r"autoguidance 1\.0: .*export it with a --guide$"):
        Sampler.load(alone).check_guidance(None, 1.0)
    file = tmp_path / "model.safetensors"
    options = ("--guide", guided, "--guidance", 1.3, "--autoguidance", 2.5, "--steps", 3)
    code, _, errors = r2id("checkpoint", "export", alone, "--out", file, *options)
    assert code == 0, errors
    step, identity = (getattr(Checkpoint.open(guided), name) for name in ("step", "identity"))
    assert pretrained.read(file).about.guide == {"step": step, "identity": identity}
    defaults = Sampler.load(file).defaults
    assert (defaults.guidance, defaults.autoguidance, defaults.steps) == (1.3, 2.5, 3)
    pictures = []
    for source, settings in ((file, ()), (file, ("--autoguidance", 2.5)), (alone, ())):
        picture = tmp_path / f"{len(pictures)}.png"
        settings = (*settings, "--count", 2, "--size", "8x8", "--out", picture)
        code, _, errors = r2id("sample", source, *settings)
        assert code == 0, errors
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_published_folder_has_the_figures_of_its_own_guide(
    r2id, digits, classifier_file, guided: Path, tmp_path
) -> None:
    earlier = list_checkpoints(guided / "checkpoints")[0]

    def publish(folder: str, *options: object) -> tuple[int, str, str]:
        return r2id("checkpoint", "export", guided, "--out", tmp_path / folder, *options)

    def measure(model: Path, folder: str) -> Path:
        report = tmp_path / folder
        report.mkdir()
        (report / "classifier.safetensors").write_bytes(classifier_file.read_bytes())
        code, _, errors = r2id("evaluate", model, "--shards", digits, "--out", report, "--count", 8)
        assert code == 0, errors
        return report

    with_guide = ("--guide", guided, "--autoguidance", 2)
    of_the_run = measure(guided, "of-the-run")
    code, _, errors = publish("refused", *with_guide, "--report", of_the_run)
    assert code == 2 and "measured with another model, or guide" in errors
    code, out, errors = publish("plain", *with_guide)
    assert code == 0 and "guided by step 12" in out, errors
    own = measure(tmp_path / "plain", "own")
    for guide, step in ((guided, "12"), (earlier, "6")):
        code, _, errors = publish(step, "--guide", guide, "--autoguidance", 2, "--report", own)
        assert (code, "measured with another" in errors) == (
            (0, False) if step == "12" else (2, True)
        )
    card = (tmp_path / "12" / "README.md").read_text()
    assert "autoguidance 2 away from the weights of step 12" in card
    assert json.loads((tmp_path / "12" / "config.json").read_text())["guide"]["step"] == 12
    code, _, errors = publish("of-the-run-itself", "--report", of_the_run)
    assert code == 0, errors


def test_what_cannot_guide_is_refused(
    r2id, train_r2id, guided: Path, riae_run: Path, tmp_path
) -> None:
    wider = train_r2id("r2id.width=48")
    alone = train_r2id("sample.autoguidance=0.0", guide_after=None)
    free = train_r2id("r2id.condition=none", "sample.guidance=1.0")
    refused = {
        (guided, "--guide", wider): f"--guide {wider}.*: has r2id.width = 48; must have 32, as ",
        (guided, "--guide", riae_run): "a model of stage 'riae', not 'r2id'",
        (guided, "--guide", tmp_path / "none"): f"{tmp_path}/none: no such",
        (riae_run, "--guide", guided): "--guide: goes with an R2ID, and .* is an RIAE",
        (riae_run, "--guidance-interval", "0,1"): "--guidance-interval: goes with an R2ID",
        (alone, "--autoguidance", 2): "autoguidance 2.0: .* or export it with a --guide$",
        (free, "--guidance", 3): "guidance 3.0: .* trained without conditions; must be 0 or 1",
        (guided, "--eta", 0.5, "--solver", "heun"): "eta = 0.5: goes with solver 'ddim'",
    }
    for (model, *options), message in refused.items():
        out = tmp_path / "refused.safetensors"
        code, _, errors = r2id("checkpoint", "export", model, "--out", out, *options)
        assert code == 2 and not out.exists(), errors
        assert re.search(message, errors.splitlines()[-1]), errors
