"""The launch scripts in a folder of their own, with a .venv that starts this interpreter, and
small jobs for them.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import CONFIGS, TINY_RIAE
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
BASE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def bash(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A checkout where nothing is installed."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("pipelines", "data_prep", "r2id", "configs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def checkout(bare: Path) -> Path:
    """A checkout whose .venv starts this interpreter, stamped as set-up stamps it."""
    binaries = bare / ".venv" / "bin"
    executable(binaries / "python", f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    stamp = bash("cat pyproject.toml <(pwd -P) | cksum", bare).stdout.strip()
    (bare / ".venv" / "complete").write_text(stamp + "\n")
    return bare


def training(run: Path, shards: Path, *more: str) -> list[str]:
    """Arguments of r2id train for a small RIAE on the digits."""
    return [
        str(CONFIGS / "digits" / "riae.toml"),
        *TINY_RIAE,
        f"run={run}",
        f"data.shards={shards}",
        "train.precision=float32",
        "train.preview_every=100000",
        "train.log_every=1",
        *more,
    ]


class Job:
    """A script that runs in the background."""

    def __init__(self, command: Sequence[str], checkout: Path, **environment: str) -> None:
        self.log = checkout / "job.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=checkout,
                stdout=log,
                stderr=log,
                env={**os.environ, "PYTHONPATH": str(checkout), **BASE, **environment},
            )

    def wait_for(self, path: Path) -> None:
        """Until a file is there. Fails with what the job said when it ends before."""
        wait_until(path.exists, alive=self.process, said=lambda: self.log.read_text()[-4000:])

    def end(self, number: signal.Signals | None = None, seconds: float = 120) -> int:
        """Send a signal, if any, and wait; the exit code."""
        if number is not None:
            self.process.send_signal(number)
        return self.process.wait(seconds)
