"""A second process in a folder that is written to is told at once, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from pipelines import pipeline
from r2id.config import PipelineRun, PrepareConfig, load_config
from r2id.errors import WorkError
from r2id.files import exclusive
from r2id.sampling.files import draw_many
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_RIAE

Work = Callable[[Path, pytest.FixtureRequest], object]


def train_there(out: Path, _: pytest.FixtureRequest) -> None:
    # Data that are missing would be told if anything came before the look at the folder.
    more = [f"run={out}", "data.shards=missing"]
    train(load_config(CONFIGS / "digits" / "riae.toml", [*TINY_RIAE, *more]))


def prepare_there(out: Path, _: pytest.FixtureRequest) -> None:
    prepare(PrepareConfig(dataset="digits", out=out))


def encode_there(out: Path, request: pytest.FixtureRequest) -> None:
    encode(request.getfixturevalue("riae_run"), request.getfixturevalue("digits"), out)


def draw_there(out: Path, request: pytest.FixtureRequest) -> None:
    draw_many(request.getfixturevalue("r2id_run"), out, [(8, 8)], kind="png", count=2)


def run_there(out: Path, _: pytest.FixtureRequest) -> None:
    config = load_config(CONFIGS / "digits" / "pipeline.toml", [f"out={out}"])
    assert isinstance(config, PipelineRun)
    pipeline.run_pipeline(config, CONFIGS / "digits")


@pytest.mark.parametrize("work", [train_there, prepare_there, encode_there, draw_there, run_there])
def test_a_second_process_is_told(
    work: Work, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    with exclusive(out), pytest.raises(WorkError, match=f"{out}: another process is at work"):
        work(out, request)
    assert not out.exists()


def test_a_folder_in_which_nothing_was_done_is_removed_with_those_above_it(tmp_path: Path) -> None:
    with exclusive(tmp_path / "runs" / "new" / "riae"):
        (tmp_path / "runs" / "other").touch()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]
