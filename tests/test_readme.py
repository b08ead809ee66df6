"""The documents: their paths, configs, settings and commands exist, and their Python examples run as printed."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from r2id.cli.options import app
from r2id.config import load_config
from r2id.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / folder / "README.md" for folder in ("configs", "data_prep", "launch", "r2id")),
    ROOT / "tests" / "bench" / "README.md",
]
FOLDERS = ("configs", "data_prep", "launch", "pipelines", "r2id", "tests", ".github")
MADE_BY_RUNS = ("r2id/training/losses/",)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.S | re.M)


def commands(document: Path) -> list[list[str]]:
    """Every command line: the lines of the shell blocks, and what stands between backticks and begins like one."""
    text = document.read_text()
    lines = [
        line
        for block in blocks(document, "bash")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    lines += [
        code for code in re.findall(r"`([^`]+)`", prose) if re.match(r"r2id |bash |python |torchrun ", code)
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def r2id_arguments(words: list[str]) -> list[str] | None:
    """The arguments of the r2id command that a command line starts, if it starts one."""
    if words[0] == "r2id":
        return words[1:]
    if "r2id.cli" in words:
        return words[words.index("r2id.cli") + 1 :]
    for script, command in (("train.sh", ["train"]), ("flow.sh", ["run"]), ("multinode.sh", [])):
        at = next((i for i, word in enumerate(words) if word.endswith(f"launch/{script}")), None)
        if at is not None:
            return command + [w for w in words[at + 1 :] if w not in ("--hostfile", "hosts")]
    if any(word.endswith("launch/slurm.sh") for word in words) and "stages" not in words:
        return words[words.index("launch/slurm.sh") + 1 :]
    return None
