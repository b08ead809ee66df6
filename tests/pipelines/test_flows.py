"""The flows on a real Prefect server; the whole pipeline on digits: stopped, killed, run again."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from pipelines.flows import train_flow
from pipelines.pipeline import PipelineExecution, run_pipeline
from pipelines.preparation import prepare_flow
from r2id.checkpoints import Checkpoint
from r2id.config import PipelineRun, PrepareConfig, load_config
from r2id.errors import InputError
from r2id.files import NOISE_SHIFT_FILE
from tests.waiting import wait_until

RIAE = """
stage = "riae"
run = "overridden by the pipeline"
[data]
shards = "overridden by the pipeline"
[riae]
latent_channels = 2
downsample = 4.0
width = 16
features = 2
[train]
steps = 40
batch = 16
save_every = 5
log_every = 5
"""
R2ID = """
stage = "r2id"
run = "overridden by the pipeline"
codec = "overridden by the pipeline"
[data]
shards = "overridden by the pipeline"
[r2id]
width = 16
heads = 2
encoder_blocks = 1
decoder_blocks = 1
[train]
steps = 20
batch = 16
save_every = 5
log_every = 5
"""
PIPELINE = """
stage = "pipeline"
name = "tiny"
out = "runs/tiny"
[prepare]
dataset = "digits"
out = "data/digits"
[riae]
config = "riae.toml"
[finetune]
config = "riae.toml"
set = ["train.steps=10", "loss.freeze_encoder=true"]
[r2id]
config = "r2id.toml"
[sample]
sizes = [[8, 8], [6, 9]]
count = 4
steps = 2
[evaluate]
sizes = [[8, 8]]
count = 20
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, text in {"riae": RIAE, "r2id": R2ID, "pipeline": PIPELINE}.items():
        (folder / f"{name}.toml").write_text(text)
    return folder


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own.

    Where a flow has run, Prefect's services make every process that is forked later fail at its
    end, loader processes among them.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def prepare_by_flow(config: PrepareConfig) -> Path:
    return prepare_flow(config)


def train_by_flow(config: Path, overrides: list[str]) -> None:
    train_flow(config, overrides)


def test_prepare_writes_the_same_shards_in_one_process_and_in_two(
    server: None, tmp_path: Path
) -> None:
    for workers in (1, 2):
        config = PrepareConfig(dataset="digits", out=tmp_path / str(workers), workers=workers)
        assert apart(prepare_by_flow, config) == config.out
    files = [
        sorted(file.relative_to(tmp_path / n) for file in (tmp_path / n).rglob("*.tar"))
        for n in ("1", "2")
    ]
    assert files[0] == files[1]
    assert files[0]
    assert (tmp_path / "1" / "manifest.json").read_bytes() == (
        tmp_path / "2" / "manifest.json"
    ).read_bytes()


def test_a_misspelt_option_is_an_input_error(server: None, configs: Path) -> None:
    with pytest.raises(InputError, match="stpes"):
        apart(train_by_flow, configs / "riae.toml", ["train.stpes=3"])
    with pytest.raises(InputError, match="stage 'pipeline'"):
        apart(train_by_flow, configs / "pipeline.toml", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("r2id.train.stpes=3", "stpes"),
        ("riae.config=r2id.toml", "of stage 'r2id', must be 'riae'"),
        ("r2id.config=nowhere.toml", "no such config file"),
    ],
)
def test_wrong_stage_configs_are_told_before_anything_starts(
    configs: Path, override: str, message: str
) -> None:
    config = load_config(configs / "pipeline.toml", [override, f"out={configs}/out"])
    assert isinstance(config, PipelineRun)
    with pytest.raises(InputError, match=message):
        run_pipeline(config, configs)
    assert not (configs / "out").exists()


def test_files_that_are_gone_are_made_again(configs: Path) -> None:
    """As when somebody removed the pictures, but not the folder that they were in.

    So are those of other weights or of another noise shift.
    """
    config = load_config(configs / "pipeline.toml", [f"out={configs}/out"])
    assert isinstance(config, PipelineRun)
    for run, step in {"riae": 40, "riae-finetuned": 10, "r2id": 20}.items():
        folder = configs / "out" / run / "checkpoints"
        (folder / f"step-{step:08d}").mkdir(parents=True)
        (folder / f"step-{step:08d}" / "checkpoint.json").write_text("{}")
        (folder / "latest").write_text(f"step-{step:08d}")
    samples, report = configs / "out/samples", configs / "out/report"
    samples.mkdir()
    report.mkdir()
    picture, page, metrics = samples / "8x8.png", report / "report.html", report / "metrics.json"

    def draw() -> dict[str, Any]:
        picture.write_bytes(b"drawn")
        return {"files": [str(picture)]}

    def evaluate() -> dict[str, Any]:
        page.write_text("measured")
        metrics.write_text("{}")
        return {"headlines": ["good"]}

    def redone() -> list[str]:
        pipeline = PipelineExecution(config, configs)
        pipeline.once("sample", {}, samples, draw)
        pipeline.once("evaluate", {}, report, evaluate, (page, metrics))
        return [stage["stage"] for stage in pipeline.stages if stage["time"] != "up to date"]

    assert redone() == ["sample", "evaluate"]
    assert redone() == []
    picture.unlink()
    assert redone() == ["sample"]
    assert picture.exists()
    (configs / "out/r2id" / NOISE_SHIFT_FILE).write_text("applied")
    assert redone() == ["sample", "evaluate"]
    weights = configs / "out/r2id/checkpoints/step-00000020/checkpoint.json"
    weights.write_text('{"files": "others"}')
    assert redone() == ["sample", "evaluate"]
    for file in (page, metrics):
        file.unlink()
        assert redone() == ["evaluate"]
        assert file.exists()


class Running:
    """``r2id run`` on the tiny pipeline, in a process of its own."""

    def __init__(self, folder: Path, configs: Path) -> None:
        self.folder = folder
        self.log = (folder / "log").open("a+")
        self.began = self.log.tell()
        environment = {
            key: value for key, value in os.environ.items() if key != "MLFLOW_TRACKING_URI"
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "r2id.cli", "run", str(configs / "pipeline.toml"), "--json"],
            cwd=folder,
            env={**environment, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )

    def wait_for(self, path: str) -> None:
        wait_until((self.folder / path).exists, 300, alive=self.process, said=self.said)

    def said(self) -> str:
        self.log.seek(self.began)
        return self.log.read()

    def children(self) -> list[int]:
        """Processes that were started, by their id, in the order in which they were."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                if int(stat.read_text().rsplit(")", 1)[1].split()[1]) == self.process.pid:
                    found.append(int(stat.parent.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return sorted(found)

    def stage(self) -> int:
        """The process of the present stage."""
        return next(pid for pid in self.children() if b"r2id.cli" in command_of(pid))

    def finish(self) -> tuple[int, str]:
        output, _ = self.process.communicate(timeout=300)
        return self.process.returncode, output


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.slow
def test_the_pipeline_survives_what_happens_to_it(tmp_path: Path, configs: Path) -> None:
    """Stop it by SIGTERM while RIAE trains, run it with R2ID's training killed, run it again."""
    first = Running(tmp_path, configs)
    first.wait_for("runs/tiny/riae/checkpoints/latest")
    started = first.children()
    first.process.send_signal(signal.SIGTERM)
    code, _ = first.finish()
    assert code == 75, first.said()
    riae = Checkpoint.open(tmp_path / "runs/tiny/riae")
    assert f"step {riae.step} of 40 saved" in first.said() and riae.step < 40
    wait_until(
        lambda: not any(map(command_of, started)), said=lambda: list(map(command_of, started))
    )

    second = Running(tmp_path, configs)
    second.wait_for("runs/tiny/r2id/checkpoints/latest")
    os.kill(second.stage(), signal.SIGKILL)
    killed_at = Checkpoint.open(tmp_path / "runs/tiny/r2id").step
    code, output = second.finish()
    assert code == 0, second.said()
    assert "Traceback" not in second.said()
    result = json.loads(output)
    assert [Path(picture).name for picture in result["pictures"]]
    assert all(
        (tmp_path / picture).exists()
        for picture in [*result["pictures"], result["report"], result["metrics"]]
    )
    assert result["headlines"]

    third = Running(tmp_path, configs)
    code, output = third.finish()
    assert code == 0, third.said()
    assert json.loads(output) == result
    assert third.said().count("up to date") == 2
    check_tracked(tmp_path, killed_at)


def check_tracked(folder: Path, killed_at: int) -> None:
    """One parent run over all three starts, its children, and no step recorded twice.

    Of what R2ID had recorded up to the checkpoint that it was ``killed_at``, it may not have sent
    all to both runs.
    """
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    record = json.loads((folder / "runs/tiny/pipeline.json").read_text())
    parent = record["mlflow_run"]
    assert [note["recorded_in"] for note in record["notes"].values()] == [parent] * 4
    runs = client.search_runs([client.get_experiment_by_name("r2id").experiment_id])
    children = {
        run.info.run_name: run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent
    }
    stages = ["prepare", "riae", "riae-finetuned", "encode", "r2id", "sample", "evaluate"]
    assert sorted(children, key=lambda name: children[name].info.start_time) == stages
    assert len(runs) == 1 + len(children)
    assert client.get_run(parent).info.status == "FINISHED"
    for stage, last in {"riae": 40, "riae-finetuned": 10, "r2id": 20}.items():
        own, whole_pipelines = (
            [point.step for point in client.get_metric_history(run, name)]
            for run, name in (
                (children[stage].info.run_id, "loss/loss"),
                (parent, f"{stage}/loss/loss"),
            )
        )
        for steps in (own, whole_pipelines):
            assert steps == sorted(set(steps)) and steps[-1] == last
        sure = killed_at if stage == "r2id" else 0
        both = [[step for step in steps if step > sure] for steps in (own, whole_pipelines)]
        assert both[0] == both[1] and {*range(sure + 5, last + 1, 5)} <= {*both[0]}
    whole = client.get_run(parent)
    assert whole.inputs.dataset_inputs[0].dataset.name == "digits"
    assert "results/accuracy 8x8" in whole.data.metrics
    files = {
        file.path
        for name in ("report", "samples", "r2id")
        for file in client.list_artifacts(parent, name)
    }
    assert files >= {"report/report.html", "samples/8x8.png", "r2id/film.png"}
