"""What a run takes from its config before it trains, and what it says when it goes on."""

import re
from pathlib import Path

import pytest
import torch

from r2id import dist
from r2id.training.losses.r2id import by_time, time_quarters
from r2id.training.resume import _changes
from r2id.training.tasks import RiaeTask, make_task
from tests.evaluation.folders import write_folder
from tests.training.configs import riae_config


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
        assert bool(re.search(said, capsys.readouterr().err)) == told


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
