"""Shards that are deleted while a training reads them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from r2id import cli
from r2id.checkpoints import Checkpoint
from r2id.config import PrepareConfig, load_config, to_toml
from r2id.training.loop import train
from r2id.training.losses.r2id import R2idLoss
from tests.training.test_loop import assert_same, r2id_config, without_cache

STEPS, SAVED = 12, 2

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in some fifty shards."""
    out = tmp_path_factory.mktemp("many") / "shards"
    prepare(PrepareConfig(dataset="digits", out=out, shard_mb=0.1))
    return out


@pytest.fixture(scope="module")
def whole(shards: Path, riae_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training to which nothing happens."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load_config(config_file(shards, riae_run, run)))  # type: ignore[arg-type]
    return run


@pytest.fixture
def r2id(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """The command in this process: (exit code, what it says at the end)."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["r2id", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        return code, [
            line
            for line in capfd.readouterr().err.splitlines()
            if line.startswith(("failed: ", "error: "))
        ]

    return run


def config_file(shards: Path, codec: Path, run: Path) -> Path:
    """Of a training that reads images, a few of each shard, and no shard before it has to."""
    config = without_cache(
        r2id_config(
            shards,
            codec,
            run,
            f"train.steps={STEPS}",
            "train.batch=8",
            f"train.save_every={SAVED}",
            "train.preview_every=99",
        )
    )
    file = run.with_suffix(".toml")
    file.write_text(to_toml(config))
    return file


def open_files() -> Counter[str]:
    """How often this process has each file open."""
    return Counter(
        str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()
    )


def delete_shards(shards: Path, are_open: bool, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In the step after SAVED, delete the training shards that the training has open already, or
    those that it has not; the list that is to have their names.
    """
    forward, gone, before = (
        R2idLoss.forward,
        [],
        open_files(),
    )  # by an earlier training, whose index is kept

    def deleting(self: R2idLoss, *args: Any, **batch: Any) -> Any:
        if batch["step"] == SAVED and not gone:
            held = open_files() - before
            gone.extend(
                str(file)
                for file in sorted((shards / "train").glob("*.tar"))
                if (str(file) in held) == are_open
            )
            for file in gone:
                Path(file).unlink()
        return forward(self, *args, **batch)

    monkeypatch.setattr(R2idLoss, "forward", deleting)
    return gone


def test_a_shard_deleted_before_it_is_opened(
    shards: Path,
    riae_run: Path,
    whole: Path,
    tmp_path: Path,
    r2id: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ends the training with its name and leaves the last checkpoint; once it is rebuilt, the same
    command goes on.
    """
    command = ("train", config_file(shards, riae_run, tmp_path / "run"))
    with monkeypatch.context() as patch:
        gone = delete_shards(shards, False, patch)
        code, said = r2id(*command)
    assert gone and code == 1
    assert len(said) == 1 and any(file in said[0] for file in gone)
    newest = Checkpoint.open(tmp_path / "run")
    assert newest.step == SAVED and not newest.damages()
    code, (said_again,) = r2id(*command)
    assert code == 2 and gone[0] in said_again and "prepare" in said_again
    assert r2id("verify", shards, "--repair")[0] == 0
    assert r2id(*command) == (0, [])
    assert_same(whole, tmp_path / "run")


def test_a_shard_deleted_while_it_is_open(
    shards: Path,
    riae_run: Path,
    whole: Path,
    tmp_path: Path,
    r2id: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system keeps it for those who have it open: this training ends as if nothing had
    happened, the next one does not begin.
    """
    command = ("train", config_file(shards, riae_run, tmp_path / "run"))
    with monkeypatch.context() as patch:
        gone = delete_shards(shards, True, patch)
        assert r2id(*command) == (0, [])
    assert gone
    assert_same(whole, tmp_path / "run")
    assert r2id(*command)[0] == 2
    assert r2id("verify", shards, "--repair")[0] == 0
    assert r2id(*command) == (0, [])
