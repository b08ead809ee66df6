"""Text is UTF-8, whatever the locale: files, and what other programs print."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for name in ("r2id", "pipelines", "data_prep") for path in (ROOT / name).rglob("*.py")
)
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale in which Python takes text for ASCII."""


def texts_without_encoding(source):
    """Line numbers of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        name = (
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        )
        modes = [a.value for a in [*node.args, *named.values()] if isinstance(a, ast.Constant)]
        binary = any(isinstance(mode, str) and "b" in mode and len(mode) < 4 for mode in modes)
        whole = (
            name in ("read_text", "write_text") or "text" in named or "universal_newlines" in named
        )
        opened = (
            name == "fdopen"
            or name == "TextIOWrapper"
            or (
                name == "open"
                and (
                    isinstance(node.func, ast.Name)
                    or not node.args
                    or any(mode in ("r", "w", "a", "x", "r+", "w+") for mode in modes)
                )
                and not_an_archive(node.func)
            )
        )
        if (whole or opened) and "encoding" not in named and not binary:
            yield node.lineno


def not_an_archive(function):
    """Whether ``open`` is that of a path, and not of a class of this project or of an archive."""
    owner = function.value if isinstance(function, ast.Attribute) else None
    return not (
        isinstance(owner, ast.Name)
        and (owner.id[0].isupper() or owner.id in ("tarfile", "opening", "display"))
    ) and not (isinstance(owner, ast.Name) and owner.id == "self")


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("path.read_text()", 1),
        ("path.write_text(text)", 1),
        ("path.open()", 1),
        ("open(name)", 1),
        ("subprocess.run(command, text=True)", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("path.open('rb')", 0),
        ("path.open('w')", 1),
        ("open(name, 'wb')", 0),
        ("Checkpoint.open(path)", 0),
    ],
)
def test_calls_are_told_apart(source, count):
    assert len(list(texts_without_encoding(source))) == count


def test_no_text_is_in_the_encoding_of_the_locale():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in texts_without_encoding(path.read_text(encoding="utf-8"))
    ]
    assert not found


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte order mark"])
def test_a_config_is_utf8_in_any_locale(tmp_path, mark):
    """Also what is printed: signs that the locale lacks are escaped."""
    config = tmp_path / "riae.toml"
    text = 'stage = "riae"\nrun = "läufe/α"\n[data]\nshards = "bilder ü"\n[train]\nsteps = 4\n'
    config.write_text(mark + text, encoding="utf-8")
    code = (
        "from pathlib import Path; import sys; from r2id.config import load_config; "
        "sys.stdout.write(ascii(str(load_config(Path(sys.argv[1])).run)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config)],
        env={**os.environ, **ASCII},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert ascii("läufe/α") == done.stdout


def test_signs_that_the_terminal_lacks_are_escaped(tmp_path):
    """An exit code and a result, not a traceback, for a folder called so."""
    folder = tmp_path / "größe→"
    command = [sys.executable, "-m", "r2id.cli", "prepare", "digits", "--out", str(folder)]
    done = subprocess.run(
        command, env={**os.environ, **ASCII}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert " train, " in done.stdout and "Traceback" not in done.stderr
