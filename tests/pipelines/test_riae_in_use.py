"""A pipeline does not train an RIAE on under the latents and the R2ID that were made with it."""

from pathlib import Path

import pytest

from pipelines.pipeline import PipelineExecution, newest_step
from r2id.config import PipelineRun, load_config
from r2id.errors import InputError
from tests.pipelines.test_settings import PIPELINE, R2ID, RIAE


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Configs of a pipeline whose RIAE has 40 steps, and whose out is there."""
    for name, text in {"riae": RIAE, "r2id": R2ID, "pipeline": PIPELINE}.items():
        (tmp_path / f"{name}.toml").write_text(text.replace("{out}", str(tmp_path / "out")))
    return tmp_path


def pipeline(base: Path, *overrides: str) -> PipelineExecution:
    config = load_config(base / "pipeline.toml", overrides)
    assert isinstance(config, PipelineRun)
    return PipelineExecution(config, base)


def checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")


@pytest.mark.parametrize("user", ["latents", "r2id", "both"])
def test_it_stops_before_it_trains(base: Path, user: str) -> None:
    out = base / "out"
    checkpoint(out / "riae", 20)
    checkpoint(out / "riae", 40)
    pipeline(base, "riae.train.steps=80")  # nothing uses it yet
    if user != "r2id":
        (out / "latents" / "train").mkdir(parents=True)
    if user != "latents":
        checkpoint(out / "r2id", 10)
    with pytest.raises(InputError) as caught:
        pipeline(base, "riae.train.steps=80")
    said = str(caught.value)
    assert "riae.train.steps = 80" in said and "at step 40" in said and "steps=40" in said
    assert [str(out / name) in said for name in ("latents", "r2id")] == [
        user != "r2id",
        user != "latents",
    ]
    pipeline(base)  # as it was trained
    pipeline(base, "riae.train.steps=30")


def test_a_finetuned_riae_is_not_trained_on_either(base: Path) -> None:
    out, finetune = base / "out", ("finetune.config=riae.toml", "finetune.train.steps=20")
    checkpoint(out / "riae", 40)
    checkpoint(out / "r2id", 10)
    checkpoint(out / "riae-finetuned", 10)
    with pytest.raises(
        InputError, match=r"finetune\.train\.steps = 20: .*-finetuned is at step 10"
    ):
        pipeline(base, *finetune)
    checkpoint(out / "riae-finetuned", 20)
    pipeline(base, *finetune)


def test_an_riae_that_is_gone_would_be_trained_anew(base: Path) -> None:
    checkpoint(base / "out" / "r2id", 10)
    assert newest_step(base / "out" / "riae") == 0
    with pytest.raises(InputError, match="at step 0, and training it on would invalidate"):
        pipeline(base)


def test_a_copy_of_a_checkpoint_is_none(base: Path) -> None:
    checkpoint(base / "riae", 20)
    (base / "riae" / "checkpoints" / "step-00000020").rename(
        base / "riae" / "checkpoints" / "step-00000020-backup"
    )
    checkpoint(base / "riae", 10)
    assert newest_step(base / "riae") == 10
