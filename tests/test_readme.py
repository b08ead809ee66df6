"""The documents: their paths, configs, settings and commands exist, and their Python examples run
as printed.
"""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.main import get_command

from r2id.checkpoints.export import export
from r2id.cli.options import app
from r2id.config import PipelineRun, R2idRun, RiaeRun, load_config

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted(ROOT.glob("*/README.md")), ROOT / "tests" / "bench" / "README.md"]
SCRIPTS = {
    "app.sh": ["app"],
    "train.sh": ["train"],
    "flow.sh": ["run"],
    "multinode.sh": [],
    "slurm.sh": [],
}


def of(document: Path) -> str:
    return str(document.relative_to(ROOT))


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=of)


def blocks(document: Path, language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.S | re.M)


def spans(document: Path) -> list[str]:
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", document.read_text(), flags=re.S))


def commands(document: Path) -> list[list[str]]:
    """The words of every command: the lines of shell blocks, and spans that name more than a
    command.
    """
    lines = "".join(blocks(document, "bash")).replace("\\\n", " ").splitlines()
    lines += [span for span in spans(document) if re.match(r"(r2id|bash|torchrun|sbatch) ", span)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def r2id_arguments(words: list[str]) -> list[str] | None:
    """What the r2id command is given, where a command line starts it by itself, by torchrun or by
    a script.
    """
    if words[0] == "r2id":
        return words[1:]
    if "r2id.cli" in words:
        return words[words.index("r2id.cli") + 1 :]
    for place, word in enumerate(words):
        command = SCRIPTS.get(word.removeprefix("launch/"))
        if command is not None:
            given = words[place + 1 :]
            given = given[2:] if given[:1] == ["--hostfile"] else given
            return None if given[:1] in (["stages"], ["COMMAND"]) else [*command, *given]
    return None


@cache
def root_command() -> Any:
    return get_command(app)


def find_command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of r2id that is named, and its arguments."""
    found, rest = root_command(), list(words)
    while hasattr(found, "commands"):
        assert rest and rest[0] in found.commands, f"no such command: r2id {' '.join(words)}"
        found = found.commands[rest.pop(0)]
    return found, rest


def check_overrides(words: list[str]) -> None:
    """Load the config that ``train``, ``plan`` or ``run`` is given, with its overrides and those
    of a pipeline's stages.
    """
    config = ROOT / words[0]
    loaded = load_config(config, [word for word in words[1:] if re.match(r"[\w.]+=", word)])
    if isinstance(loaded, PipelineRun):
        for stage in (loaded.riae, loaded.r2id):
            load_config(config.parent / stage.config, stage.set)


@every_document
def test_commands_are_understood(document):
    for words in commands(document):
        arguments = r2id_arguments(words)
        if arguments is None:
            continue
        command, rest = find_command(arguments)
        known = {name for parameter in command.params for name in (*parameter.opts, "--help")}
        for option in (word for word in rest if word.startswith("--")):
            assert option in known, f"{option} in: {' '.join(words)}"
        if "…" not in rest and rest:
            command.make_context(command.name, list(rest))
        if rest and rest[0].startswith("configs/"):
            check_overrides(rest)


@every_document
def test_paths_exist(document):
    text = document.read_text()
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    for link in links:
        if link and "://" not in link:
            assert (document.parent / link).exists(), link
    folders = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.is_dir())
    for path in re.findall(rf"(?<![\w/.~-])(?:{folders})/[\w./-]*\w", text):
        if not path.startswith(("data/", "runs/")):
            assert (ROOT / path).exists(), path
    for anchor in re.findall(r"\]\(#([\w-]+)\)", text):
        titles = re.findall(r"^#+ (.*)$", text, re.M)
        assert anchor in [title.lower().replace(" ", "-") for title in titles], anchor


@every_document
def test_settings_exist(document):
    sections: dict[str, set[str]] = {}
    for run in (RiaeRun, R2idRun, PipelineRun):
        for name, field in run.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                sections.setdefault(name, set()).update(field.annotation.model_fields)
    for span in spans(document):
        setting = re.fullmatch(r"(\w+)\.(\w+)(=.*)?", span)
        if setting and setting[1] in sections and setting[2] not in ("toml", "Pipeline"):
            assert setting[2] in sections[setting[1]], span


def test_the_readme_is_read():
    assert len(README.read_text().splitlines()) <= 180


def run_example(document: Path) -> dict[str, Any]:
    """Run the first Python block as a program; what its names are at the end."""
    names: dict[str, Any] = {}
    exec(compile(blocks(document, "python")[0], of(document), "exec"), names)
    return names


def test_the_example_of_a_trained_model(r2id_run, tmp_path, monkeypatch):
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "r2id").symlink_to(r2id_run)
    monkeypatch.chdir(tmp_path)
    names = run_example(README)
    assert len(names["digits"]) == 10 and names["digits"][3].size == (32, 48)
    assert names["wide"].size == (96, 48) and names["other"].size == (32, 48)
    assert names["part"][0].size == (400, 400)
    assert (tmp_path / "three.png").is_file()


def test_the_example_of_an_exported_model(r2id_run, tmp_path, monkeypatch):
    export(r2id_run, tmp_path / "r2id.safetensors")
    monkeypatch.chdir(tmp_path)
    names = run_example(ROOT / "r2id" / "README.md")
    assert names["larger"].shape == (2, names["riae"].channels, 80, 60)
    assert names["prediction"].shape == (2, names["model"].channels, 6, 4)
