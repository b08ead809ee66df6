"""What `r2id plan` says of disks, against what runs leave there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from r2id.config import R2idRun, RiaeRun, TrainConfig, load_config
from r2id.files import step_of
from r2id.training.communication import GPUS
from r2id.training.disk_estimate import describe_disk, disk, kept_steps
from r2id.training.encode import encode
from r2id.training.loop import train
from r2id.training.planner import plan
from r2id.training.workload import Dimensions, Workload
from tests.conftest import CONFIGS

DIGITS = CONFIGS / "digits"
RUN = (
    "tracking.enabled=false",
    "train.steps=12",
    "train.batch=8",
    "train.save_every=2",
    "train.preview_every=100",
    "train.milestone_every=3",
    "train.ema_profiles=[0.05,0.1]",
    "train.ema_snapshot_every=5",
    "data.flip=true",
)


def planned(config: Path, changes: tuple[str, ...]) -> dict[str, Any]:
    return plan(config, changes, gpus=1, gpu=GPUS["a100"], share=0.4)["disk"]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def test_runs_leave_what_is_planned(digits: Path, tmp_path: Path) -> None:
    riae = (*RUN, f"run={tmp_path}/riae", f"data.shards={digits}")
    latents = tmp_path / "latents"
    r2id = (
        *RUN,
        f"run={tmp_path}/r2id",
        f"codec={tmp_path}/riae",
        f"data.shards={digits}",
        f"data.latents={latents}",
        "sample.steps=1",
    )
    for name, changes in {"riae": riae, "r2id": r2id}.items():
        config = load_config(DIGITS / f"{name}.toml", changes)
        assert isinstance(config, RiaeRun | R2idRun)
        train(config)
        if name == "riae":
            encode(tmp_path / "riae", digits, latents)
        found, folder = planned(DIGITS / f"{name}.toml", changes), tmp_path / name
        kept = sorted((folder / "checkpoints").glob("step-*"))
        assert list(map(step_of, kept)) == kept_steps(config.train)
        assert len(kept) == found["checkpoints"]
        # Files have headers, and an RIAE's the statistics of its latents.
        assert size(kept[-1]) == pytest.approx(found["checkpoint"], rel=0.03)
        assert size(folder / "ema") == pytest.approx(found["averages"], rel=0.03)
        if name == "r2id":
            assert size(latents) == pytest.approx(found["latents"], rel=0.15)  # sizes of grids


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"steps": 100, "save_every": 30}, [90, 100]),
        ({"steps": 100, "save_every": 1000, "keep": 3}, [100]),
        ({"steps": 100, "save_every": 10, "milestone_every": 25}, [25, 50, 75, 90, 100]),
        ({"steps": 100, "save_every": 40, "milestone_every": 45}, [45, 90, 100]),
        (
            {"steps": 2_000_000, "save_every": 5000, "milestone_every": 500_000},
            [500_000, 1_000_000, 1_500_000, 1_995_000, 2_000_000],
        ),
    ],
)
def test_newest_checkpoints_and_milestones_are_kept(
    changes: dict[str, int], kept: list[int]
) -> None:
    assert kept_steps(TrainConfig(**changes)) == kept


def test_without_shards_latents_are_told_by_the_image() -> None:
    path = CONFIGS / "imagenet" / "r2id-xl-256.toml"
    config, riae = load_config(path), load_config(path.with_name("riae-256.toml"))
    assert isinstance(config, R2idRun) and isinstance(riae, RiaeRun)
    found = disk(Workload(config, Dimensions((256, 256), 1, 1000, riae.riae)), None)
    assert (found["latents"], found["latents_per_image"]) == (None, 16 * 16 * 64 * 4 * 2)
    assert found["averages"] == pytest.approx(32 * 2 * 4 * 677e6, rel=0.01)
    line = "disk in GB: checkpoints 15 × 16.5, averages 173, latents up to 131 per million images"
    assert describe_disk(found) == line
