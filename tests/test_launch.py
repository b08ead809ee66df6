"""The launch scripts: sound shell, one owner of every setting, and a set-up that is done once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_sound_shell_that_stops_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder of their own."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def bash(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], cwd=folder, env={**os.environ, **environment},
                          capture_output=True, text=True, check=False)


def pretend_installed(checkout: Path) -> None:
    """A .venv whose python starts this one, stamped as set-up stamps it."""
    binaries = checkout / ".venv" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    stamp = bash('cat pyproject.toml <(pwd -P) | cksum', checkout).stdout.strip()
    (checkout / ".venv" / "complete").write_text(stamp + "\n")


def test_a_second_set_up_does_nothing(checkout: Path) -> None:
    pretend_installed(checkout)
    done = bash("source launch/setup.sh && command -v python", checkout)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip() == str(checkout / ".venv" / "bin" / "python")


def test_changed_requirements_set_up_anew(checkout: Path) -> None:
    pretend_installed(checkout)
    with (checkout / "pyproject.toml").open("a") as file:
        file.write("\n# changed\n")
    done = bash("bash launch/setup.sh", checkout, PYTHON="no-such-python")
    assert done.returncode == 2
    assert "installing into" in done.stderr
    assert "set PYTHON to one" in done.stderr


def test_training_takes_the_processes_asked_for(checkout: Path) -> None:
    pretend_installed(checkout)
    for name in ("pipelines", "r2id"):
        (checkout / name).symlink_to(ROOT / name)
    torchrun = checkout / ".venv" / "bin" / "torchrun"
    torchrun.write_text('#!/bin/sh\necho "$DS_ACCELERATOR $OMP_NUM_THREADS"\n')
    torchrun.chmod(0o755)
    one = bash("bash launch/train.sh nowhere.toml", checkout, CUDA_VISIBLE_DEVICES="")
    assert one.returncode == 2
    assert "+ python -m r2id.cli train nowhere.toml" in one.stderr
    assert "nowhere.toml: no such config file" in one.stderr
    two = bash("bash launch/train.sh a.toml train.steps=3", checkout, CUDA_VISIBLE_DEVICES="", NPROC="2")
    assert "+ torchrun --standalone --nproc-per-node 2 -m r2id.cli train a.toml train.steps=3" in two.stderr
    assert two.stdout.split()[0] == "cpu"
