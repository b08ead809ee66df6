"""Training killed at any moment, or on a disk that is full: what is left is whole, and the same
command goes on.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r2id.checkpoints import Checkpoint, reading
from r2id.config import load_config
from r2id.files import step_of
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_R2ID, TINY_RIAE
from tests.training import children
from tests.waiting import wait_until


def inside_a_save(run: Path) -> bool:
    return any((run / "checkpoints").glob(".tmp-*"))


@pytest.mark.parametrize(
    ("kills", "in_a_save"), [(4, 1), pytest.param(20, 5, marks=pytest.mark.slow)]
)
def test_killed_often_the_run_ends_as_if_there_had_been_no_kill(
    kills: int, in_a_save: int, digits, riae_run, latents, tmp_path: Path
) -> None:
    """Every other kill is meant to come in the middle of a save, and so many at least do."""

    def settings(run: Path, steps: int) -> list[str]:
        return [
            *TINY_R2ID,
            "train.precision=float32",
            "optim.lr_end=1e-3",
            "optim.lr=1e-3",
            f"run={run}",
            f"data.shards={digits}",
            f"codec={riae_run}",
            f"data.latents={latents}",
            "train.save_every=1",
            "train.preview_every=100000",
            "train.ema_profiles=[0.05,0.1]",
            "train.ema_snapshot_every=3",
            f"train.steps={steps}",
        ]

    config, run, draw = CONFIGS / "digits" / "r2id.toml", tmp_path / "run", random.Random(0)
    inside, reached = 0, 0
    for number in range(kills):
        with children.ended(
            children.start(children.train_until_killed, config, settings(run, 100_000))
        ) as child:

            def advanced(reached: int = reached) -> bool:
                found = reading.list_checkpoints(run / "checkpoints")
                return bool(found) and step_of(found[-1]) > reached

            wait_until(advanced, alive=child)
            time.sleep(draw.uniform(0, 0.2))
            if number % 2:
                wait_until(lambda: inside_a_save(run), alive=child, every=0.0005)
                time.sleep(draw.uniform(0, 0.01))
            child.kill()
            child.join()
        inside += inside_a_save(run)
        newest = reading.find_checkpoint(run)
        assert not reading.find_damages(newest) and not any(
            damage
            for snapshot in reading.list_checkpoints(run / "ema")
            for damage in reading.find_damages(snapshot)
        )
        assert (run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()).is_dir()
        assert step_of(newest) > reached, "every start goes on from where the one before it was"
        reached = step_of(newest)
    assert inside >= in_a_save
    for folder, save_every in ((run, 1), (tmp_path / "whole", 100_000)):
        train(
            load_config(config, [*settings(folder, reached + 2), f"train.save_every={save_every}"])
        )
    for kind in ("model", "ema", "ema-0.1", "optimizer"):
        torch.testing.assert_close(
            Checkpoint.open(run).tensors(kind),
            Checkpoint.open(tmp_path / "whole").tensors(kind),
            rtol=0,
            atol=0,
        )
    assert [path.name for path in reading.list_checkpoints(run / "ema")] == [
        path.name for path in reading.list_checkpoints(tmp_path / "whole" / "ema")
    ]


def may_mount() -> bool:
    try:
        return (
            subprocess.run(
                ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True
            ).returncode
            == 0
        )
    except OSError:
        return False


FULL_DISK = """
mount -t tmpfs -o size=900k none "$1" || exit 9
shift
"$@" || echo "full $?"
"$@" || echo "still full $?"
python=$1
run=$(ls -d "$DISK"/run)
"$python" -m r2id.cli checkpoint verify "$run" || exit 8
ls -A "$run/checkpoints"
mount -o remount,size=50m "$DISK"
"$@" || echo "not gone on $?"
cat "$run/checkpoints/latest"
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not may_mount(),
    reason="needs a small file system of its own, and this system lets nobody mount one",
)
def test_a_full_disk_ends_the_run_and_room_lets_it_go_on(digits, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [
        sys.executable,
        "-m",
        "r2id.cli",
        "train",
        str(CONFIGS / "digits" / "riae.toml"),
        *TINY_RIAE,
        f"run={disk}/run",
        f"data.shards={digits}",
        "train.steps=6",
        "train.save_every=1",
        "train.keep=9",
    ]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", FULL_DISK, "sh", str(disk), *command],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DISK": str(disk)},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["full 1", "still full 1"]
    folders = lines[3:-2]
    assert (
        lines[2].endswith(f"{folders[-1]}: intact")
        and folders[0] == "latest"
        and 2 <= len(folders) < 7
    ), lines
    assert "images/s" in lines[-2] and lines[-1] == "step-00000006"
    failures = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failures) == 2 and all(
        "not written" in line and "No space left" in line for line in failures
    )
    assert "Traceback" not in done.stderr
