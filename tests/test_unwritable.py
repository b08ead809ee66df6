"""Output that cannot be written: one line that names it, exit code 1, and no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CONFIGS, TINY_RIAE

FULL = Path("/dev/full")
"""A device on which every write fails as on a full disk."""
NEVER = "/proc/r2id"
"""A place where nobody, not even root, can make a file."""
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs Linux")
SAMPLE = "sample {r2id_run} --count 1 --label 3 --size 8x8"
COMMANDS = {
    "data stats": ("data stats {digits} --out {tmp}/full.png", "full.png"),
    "data stats elsewhere": ("data stats {digits} --out {never}/a.png", "{never}/a.png"),
    "train": ("train {riae} run={never}/run data.shards={digits}", "{never}/run"),
    "export": ("checkpoint export {riae_run} --out {never}/a.safetensors", "a.safetensors"),
    "sample": (SAMPLE + " --out {never}/a.png", "{never}/a.png"),
    "samples": (SAMPLE + " --format png --out {never}/a", "{never}/a"),
    "reconstruct": ("reconstruct {riae_run} {tmp}/in.png --out {never}/a.png", "{never}/a.png"),
    "encode": ("encode --riae {riae_run} --shards {digits} --out {never}/a", "{never}/a"),
}


@pytest.mark.parametrize(("command", "named"), COMMANDS.values(), ids=COMMANDS.keys())
def test_it_is_told_in_one_line(
    command: str, named: str, r2id, digits: Path, riae_run: Path, r2id_run: Path, tmp_path: Path
) -> None:
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "in.png")
    places = {
        "digits": digits,
        "riae": CONFIGS / "digits" / "riae.toml",
        "riae_run": riae_run,
        "r2id_run": r2id_run,
        "never": NEVER,
        "tmp": tmp_path,
    }
    if "full" in named:
        (tmp_path / "full.png").mkdir()  # a folder in the way
    arguments = command.format(**places).split()
    more = TINY_RIAE if arguments[0] == "train" else []
    code, out, errors = r2id(*arguments, *more)
    assert (code, out) == (1, ""), errors
    lines = [line for line in errors.splitlines() if line.startswith("failed: ")]
    assert len(lines) == 1 and named.format(**places) in lines[0], errors
    assert "Traceback" not in errors


def test_what_is_printed_has_nowhere_to_go(riae_run: Path) -> None:
    """On a full disk; a pipe that is closed ends the command without a word."""
    command = [sys.executable, "-m", "r2id.cli", "checkpoint", "show", str(riae_run)]
    with FULL.open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "failed: No space left on device\n"
    closed = subprocess.run(
        ["bash", "-c", f"{' '.join(command)} | true; exit ${{PIPESTATUS[0]}}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "Traceback" not in closed.stderr and closed.stderr.count("\n") <= 1
