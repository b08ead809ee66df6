"""As many processes train as share the batch evenly; wrong numbers are said at the beginning."""

from pathlib import Path

import pytest

from pipelines.pipeline import PipelineExecution
from pipelines.processes import main, stage_processes, training_processes
from r2id.config import PipelineRun, TrainConfig, load_config
from r2id.errors import InputError
from tests.conftest import CONFIGS
from tests.pipelines.test_settings import PIPELINE, R2ID, RIAE

PUBLISHED = CONFIGS / "mnist" / "reference-r2id.toml"


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("NPROC", raising=False)


@pytest.mark.parametrize(
    ("gpus", "batch", "micro_batch", "processes"),
    [(1, 25, 0, 1), (4, 25, 0, 1), (8, 25, 0, 5), (4, 64, 0, 4), (6, 256, 32, 4), (3, 32, 5, 0)],
)
def test_as_many_gpus_as_share_the_batch(
    gpus: int, batch: int, micro_batch: int, processes: int, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    assert stage_processes() == gpus
    train = TrainConfig(steps=1, batch=batch, micro_batch=micro_batch or None)
    if not processes:
        with pytest.raises(InputError, match=rf"train\.batch = {batch}: must be a multiple of 5"):
            training_processes(train)
        return
    assert training_processes(train, tell=True) == processes
    said = capsys.readouterr().err
    told = f"train.batch = {batch} cannot be shared evenly by {gpus} GPUs: training on {processes}"
    assert said == ("" if processes == gpus else f"{told}\n")


def test_processes_that_were_asked_for_are_not_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(steps=1, batch=25)
    monkeypatch.setenv("NPROC", "5")
    assert training_processes(train) == stage_processes() == 5
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(
        InputError, match=r"^NPROC = 2: train\.batch = 25: must be a multiple of 2, .*24 or 26"
    ):
        training_processes(train)
    for wrong in ("0", "two", "-1"):
        monkeypatch.setenv("NPROC", wrong)
        with pytest.raises(InputError, match=f"^NPROC = '{wrong}': must be a whole number"):
            stage_processes()


def test_a_pipeline_says_it_before_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"riae": RIAE, "r2id": R2ID, "pipeline": PIPELINE}.items():
        (tmp_path / f"{name}.toml").write_text(text.replace("{out}", str(tmp_path / "out")))
    config = load_config(tmp_path / "pipeline.toml", ["r2id.train.batch=25", "riae.train.batch=8"])
    assert isinstance(config, PipelineRun)
    PipelineExecution(config, tmp_path)
    monkeypatch.setenv("NPROC", "2")
    with pytest.raises(InputError, match=r"^r2id: NPROC = 2: train\.batch = 25: must be"):
        PipelineExecution(config, tmp_path)


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ([str(PUBLISHED)], 1),
        (["--profile", str(PUBLISHED), "train.batch=32"], 4),
        ([str(PUBLISHED), "train.batch=x"], 4),
        (["nowhere.toml"], 4),
    ],
)
def test_the_script_is_told(words: list[str], processes: int, capsys) -> None:
    main(words)
    assert capsys.readouterr().out == f"{processes}\n"
