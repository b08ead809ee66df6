"""What a run takes from its config before it trains, and what it says when it goes on."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r2id import dist
from r2id.errors import InputError
from r2id.training.losses.r2id import by_time, time_quarters
from r2id.training.resume import _changes, restore
from r2id.training.tasks import RiaeTask, make_task
from tests.evaluation.folders import write_folder
from tests.training.configs import r2id_config, riae_config, without_cache


def test_a_run_trains_on_the_split_that_it_names(digits: Path, tmp_path: Path) -> None:
    for split, images in (("train", 1438), ("test", 359)):
        config = riae_config(digits, tmp_path, f"data.train_split={split}", "train.batch=8")
        task = make_task(config, dist.init(), 8)
        assert isinstance(task, RiaeTask) and task.images == images
        (batch,) = next(task.loader(0))
        assert all(name.startswith(f"{split}-") for name in batch["sample_ids"])


def test_a_run_says_how_much_of_the_images_its_buckets_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_folder(tmp_path, {"train": 9, "test": 1}, ((16, 8), (8, 16), (12, 12)))
    for changes, told in (("start=random",), True), (("start=random", "data.size=[8, 8]"), False):
        config = riae_config(shards, tmp_path / "run", *changes)
        capsys.readouterr()
        make_task(config, dist.init(), 8).start()
        # An image with one side twice as long as the other loses half, a square nothing.
        said = f"buckets: 1; 33% of the images' area is cut off to fit them: .* {shards} "
        err = capsys.readouterr().err
        assert bool(re.search(said, err)) == told == ("data.window" in err)


def test_a_run_says_that_its_shards_have_no_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_folder(tmp_path, {"train": 9, "val": 2})
    for split, told in (("test", True), ("val", False)):
        capsys.readouterr()
        config = riae_config(shards, tmp_path / "run", f"data.test_split={split}")
        make_task(config, dist.init(), 8)
        said = r"data\.test_split: .* no split 'test': it has train, val; an RIAE's .*--split\n"
        assert bool(re.search(said, capsys.readouterr().err)) == told


def test_repeated_samples_of_a_step_have_draws_of_their_own(riae_run: Path, tmp_path: Path) -> None:
    shards, more = write_folder(tmp_path, {"train": 3, "test": 1}), ("train.batch=8",)
    for config in (
        riae_config(shards, tmp_path / "riae", *more),
        without_cache(r2id_config(shards, riae_run, tmp_path / "r2id", *more)),
    ):
        task = make_task(config, dist.init(), 8)
        (batch,) = next(task.loader(0))
        assert batch["index"].unique().tolist() == [0, 1, 2]
        assert task.inputs(batch)["index"].unique().numel() == 8


def go_on(before, after, old_facts=None, facts=None):
    """Go on with a run of one config under another one; neither is trained."""
    meta = SimpleNamespace(
        stage=before.stage,
        step=5,
        samples=40,
        config=before.model_dump(mode="json"),
        model=old_facts or {},
    )
    state = SimpleNamespace(
        task=SimpleNamespace(config=after, facts=facts or {}),
        engine=SimpleNamespace(check=None, load=None),
    )
    restore(state, SimpleNamespace(path="step-00000005", step=5, meta=meta))
    return state


@pytest.mark.parametrize(
    ("stage", "change"),
    [
        *(
            ("riae", f"{name}={value}")
            for name, value in {
                "seed": 7,
                "data.train_split": "other",
                "data.size": "[4, 6]",
                "data.max_pixels": 99,
                "data.window": "[4, 6]",
                "data.flip": "true",
                "data.batch_pixels": 4096,
                "data.shuffle": "shards",
                "train.batch": 8,
                "train.ema_profiles": "[0.05, 0.1]",
                "riae.width": 16,
                "loss.pixel": "l1",
                "loss.latent_noise": 0.5,
                "loss.magnify": 0.125,
            }.items()
        ),
        *(
            ("r2id", f"{name}={value}")
            for name, value in {
                "data.flip": "true",
                "train.guide_after": 0.75,
                "r2id.width": 16,
                "diffusion.time_sampling": "uniform",
                "diffusion.condition_dropout": 0.25,
                "diffusion.shift_exponent": 0.5,
            }.items()
        ),
    ],
)
def test_a_run_does_not_go_on_with_another(
    stage: str, change: str, digits: Path, riae_run: Path, tmp_path: Path
) -> None:
    def config(*more):
        if stage == "riae":
            return riae_config(digits, tmp_path, *more)
        return r2id_config(digits, riae_run, tmp_path, *more)

    name = change.split("=")[0]
    with pytest.raises(InputError, match=f"{tmp_path}: holds a run with {name} = .*, not .*: "):
        go_on(config(), config(change))


def test_a_run_does_not_go_on_with_other_data(digits: Path, tmp_path: Path) -> None:
    config = riae_config(digits, tmp_path)
    said = "data.shards of digest = aaaaaaaaaaaa, not bbbbbbbbbbbb: choose another run directory"
    with pytest.raises(InputError, match=said):
        go_on(config, config, {"digest": "a" * 64}, {"digest": "b" * 64})


def test_a_run_goes_on_with_other_settings(
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("r2id.training.resume.resume", lambda *_: None)
    more = {"data.workers": 2, "train.steps": 90, "loss.perceptual_file": "elsewhere.pt"}
    after = riae_config(digits, tmp_path, *(f"{name}={value}" for name, value in more.items()))
    state = go_on(riae_config(digits, tmp_path), after)
    assert (state.start, state.step, state.samples) == (5, 5, 40)
    said = capsys.readouterr().err
    assert "going on from step 5, with other settings than before: " in said
    assert all(f"{name} = " in said for name in more)


def test_changed_settings_are_listed_but_not_new_ones() -> None:
    before = {"seed": 0, "optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "run": "a", "old": 1}
    now = {"seed": 0, "optim": {"lr": 0.2, "betas": [0.9, 0.99], "new": 5}, "run": "b"}
    assert _changes(before, now) == ["optim.lr = 0.1 → 0.2", "run = a → b"]
    assert _changes(before, before) == []


def test_errors_are_summed_within_quarters_of_the_times() -> None:
    times = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.99, 1.0])
    found = by_time(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]), time_quarters(times))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        "loss_by_time/0.00-0.25": [3.0, 2.0],
        "loss_by_time/0.25-0.50": [4.0, 1.0],
        "loss_by_time/0.50-0.75": [8.0, 1.0],
        "loss_by_time/0.75-1.00": [48.0, 2.0],
    }
