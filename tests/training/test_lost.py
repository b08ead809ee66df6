"""Shards that are deleted while a training reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.prepare import prepare
from r2id.checkpoints import Checkpoint
from r2id.config import PrepareConfig, load_config, to_toml
from r2id.training.loop import train
from r2id.training.losses.r2id import R2idLoss
from tests.training.configs import assert_same, r2id_config, without_cache

STEPS, SAVED = 12, 2

Command = Callable[..., tuple[int, str, str]]
Told = Callable[..., tuple[int, list[str]]]


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
def told(r2id: Command) -> Told:
    """Run the command in this process: (exit code, its last words)."""

    def run(*arguments: object) -> tuple[int, list[str]]:
        code, _, errors = r2id(*arguments)
        words = ("failed: ", "error: ")
        return code, [line for line in errors.splitlines() if line.startswith(words)]

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
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ends the training with its name and leaves the last checkpoint; once it is rebuilt, the same
    command goes on.
    """
    command = ("train", config_file(shards, riae_run, tmp_path / "run"))
    with monkeypatch.context() as patch:
        gone = delete_shards(shards, False, patch)
        code, said = told(*command)
    assert gone and code == 1
    assert len(said) == 1 and any(file in said[0] for file in gone)
    newest = Checkpoint.open(tmp_path / "run")
    assert newest.step == SAVED and not newest.damages()
    code, (said_again,) = told(*command)
    assert code == 2 and gone[0] in said_again and "prepare" in said_again
    assert told("verify", shards, "--repair")[0] == 0
    assert told(*command) == (0, [])
    assert_same(whole, tmp_path / "run")


def test_a_shard_deleted_while_it_is_open(
    shards: Path,
    riae_run: Path,
    whole: Path,
    tmp_path: Path,
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The system keeps it for those who have it open: this training ends as if nothing had
    happened, the next one does not begin.
    """
    command = ("train", config_file(shards, riae_run, tmp_path / "run"))
    with monkeypatch.context() as patch:
        gone = delete_shards(shards, True, patch)
        assert told(*command) == (0, [])
    assert gone
    assert_same(whole, tmp_path / "run")
    assert told(*command)[0] == 2
    assert told("verify", shards, "--repair")[0] == 0
    assert told(*command) == (0, [])
