"""A pipeline's run in MLflow and those of its stages, against a real SQLite store."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient

from r2id.config import TrackingConfig
from r2id.training.tracking import PARENT_VARIABLE, Tracker
from r2id.training.tracking.pipeline import begin_pipeline, end_pipeline
from tests.training.conftest import start, steps_of


def test_a_pipeline_has_one_run_with_all_to_see_and_children(
    client: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = {"experiment": "r2id", "name": "digits", "params": {"out": "runs/digits"}, "run": None}
    begun = begin_pipeline(begin)
    parent = begun["run"]
    monkeypatch.setenv(PARENT_VARIABLE, parent)
    first = start(dataset=("digits", "d" * 64, "data/digits"))
    first.metrics({"loss/loss": 1.0}, 1)
    first.finish("KILLED")
    trained = start(dataset=("digits", "d" * 64, "data/digits"), run_id=first.run_id)
    for step in (1, 2):  # step 1 again, as after a crash
        trained.metrics({"loss/loss": 1.0}, step)
    trained.image(np.zeros((4, 6, 3), np.uint8), "reconstructions", 2)
    trained.finish()
    report = tmp_path / "report"
    (report / "figures").mkdir(parents=True)
    for name in ("report.html", "classifier.safetensors", "figures/samples.png"):
        (report / name).write_text("x")
    stage = {
        "name": "evaluate",
        "params": {"count": 10},
        "times": None,
        "metrics": {
            "r2id": {"sizes": {"8x8": {"accuracy": 0.5, "samples": 10}}},
            "riae": {"native": {"psnr": 40.0}},
            "note": "text",
        },
        "artifacts": [str(report)],
    }
    headlines = ["samples at 8x8: class accuracy 0.5"]
    end = {"run": parent, "stages": [stage], "headlines": headlines, "pictures": ["9x9.png"]}
    end_pipeline({**end, "status": "FAILED", "pictures": ["8x8.png"]})
    assert begin_pipeline({**begin, "run": parent}) == begun
    end_pipeline({**end, "status": "FINISHED"})

    children = client.search_runs([begun["experiment"]], f"tags.`mlflow.parentRunId` = '{parent}'")
    by_stage = {run.data.tags["stage"]: run for run in children}
    assert set(by_stage) == {"riae", "evaluate"} and len(children) == 2
    assert by_stage["evaluate"].data.metrics["r2id/sizes/8x8/samples"] == 10
    run = client.get_run(parent)
    assert run.info.status == "FINISHED"
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert run.data.metrics == {
        "riae/loss/loss": 1.0,
        "results/accuracy 8x8": 0.5,
        "results/RIAE psnr native": 40.0,
    }
    assert steps_of(client, parent, "riae/loss/loss") == [1, 2]
    files = {
        file.path
        for folder in ("report", "report/figures", "riae/reconstructions")
        for file in client.list_artifacts(parent, folder)
        if not file.is_dir
    }
    assert files == {
        "report/report.html",
        "report/figures/samples.png",
        "riae/reconstructions/00000002.png",
    }
    note = run.data.tags["mlflow.note.content"]
    page = f"#/experiments/{begun['experiment']}/runs/{parent}/artifacts/report/report.html"
    assert "class accuracy 0.5" in note and f"[Report]({page}" in note
    assert "artifacts/riae/reconstructions?" in note and "film" not in note
    assert "path=samples/9x9.png" in note and "8x8.png" not in note


def test_a_stage_that_is_trained_anew_is_in_the_pipelines_run_from_its_first_step(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after its folder was removed; the run of the first training is gone on with no more."""
    begin = {"experiment": "r2id", "name": "digits", "params": {}, "run": None}
    parent = begin_pipeline(begin)["run"]
    monkeypatch.setenv(PARENT_VARIABLE, parent)

    def train(steps: range, run_id: str | None = None) -> str | None:
        tracker = start(run_id=run_id)
        for step in steps:
            tracker.metrics({"loss/loss": 1.0}, step)
        tracker.finish()
        return tracker.run_id

    train(range(1, 6))
    again = train(range(1, 3))
    assert train(range(2, 4), again) == again
    points = client.get_metric_history(parent, "riae/loss/loss")
    points.sort(key=lambda point: point.timestamp)
    assert [point.step for point in points] == [1, 2, 3, 4, 5, 1, 2, 3]


def test_a_stage_has_the_times_at_which_it_was_at_work(client: MlflowClient) -> None:
    begun = begin_pipeline({"experiment": "r2id", "name": "digits", "params": {}, "run": None})
    bare: dict[str, Any] = {"params": {}, "metrics": {}, "artifacts": []}
    now = time.time()
    all_times = {"prepare": (1000.0, 1014.5), "of an older record": None, "encode": (2000.0, None)}
    stages = [{"name": name, "times": times, **bare} for name, times in all_times.items()]
    end = {"run": begun["run"], "headlines": [], "pictures": []}
    end_pipeline({**end, "stages": stages, "status": "KILLED"})

    def look() -> dict[str, Any]:
        mine = f"tags.`mlflow.parentRunId` = '{begun['run']}'"
        runs = client.search_runs([begun["experiment"]], mine)
        return {run.info.run_name: run.info for run in runs}

    seen = look()
    prepare, old, encode = (seen[name] for name in all_times)
    assert (prepare.start_time, prepare.end_time) == (1_000_000, 1_014_500)
    assert prepare.status == old.status == "FINISHED"
    assert int(now * 1000) <= old.start_time <= old.end_time
    assert encode.status == "KILLED", "it was stopped"
    assert encode.start_time == 2_000_000 and encode.end_time >= int(now * 1000)

    done = {"name": "encode", "times": (2500.0, 2600.0), **bare}
    end_pipeline({**end, "stages": [done], "status": "FINISHED"})
    seen = look()
    assert len(seen) == 3
    encode = seen["encode"]
    assert (encode.status, encode.start_time, encode.end_time) == ("FINISHED", 2_000_000, 2_600_000)
    assert seen["prepare"].end_time == 1_014_500, "it was up to date"


def test_a_stage_is_in_the_experiment_of_its_pipeline(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where MLflow shows it, even if the setting was changed meanwhile."""
    begun = begin_pipeline({"experiment": "first", "name": "digits", "params": {}, "run": None})
    monkeypatch.setenv(PARENT_VARIABLE, begun["run"])
    child = Tracker.start(TrackingConfig(experiment="second"), run_name="riae", stage="riae")
    child.finish()
    assert child.run_id is not None
    assert client.get_run(child.run_id).info.experiment_id == begun["experiment"]


def test_a_pipeline_asks_again_for_a_store_that_is_away_for_a_moment(
    client: MlflowClient, store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    place.touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")

    def come_back(_: float) -> None:
        place.unlink()
        place.symlink_to(store_file.parent)

    clock = SimpleNamespace(monotonic=time.monotonic, sleep=come_back)
    monkeypatch.setattr("r2id.training.tracking.pipeline.time", clock)
    begun = begin_pipeline({"experiment": "r2id", "name": "away", "params": {}, "run": None})
    assert client.get_run(begun["run"]).info.run_name == "away"


@pytest.mark.slow
def test_two_pipelines_may_begin_a_new_store_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    order = {"experiment": "r2id", "name": "digits", "params": {}, "run": None}
    command = [sys.executable, "-m", "r2id.training.tracking.pipeline", "begin"]
    both = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:  # both begin to read before either gets its order
        assert process.stdin is not None
        process.stdin.write(json.dumps(order))
        process.stdin.close()
        process.stdin = None
    ended = [(*process.communicate(timeout=120), process.returncode) for process in both]
    assert [(said, code) for _, said, code in ended] == [("", 0)] * 2
    assert len({json.loads(printed)["run"] for printed, _, _ in ended}) == 2


def test_a_parent_that_is_no_pipeline_stays_as_it_is(
    client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = start(stage="sweep")
    sweep.finish()
    monkeypatch.setenv(PARENT_VARIABLE, sweep.run_id)
    child = start(dataset=("digits", "d" * 64, "data/digits"))
    child.metrics({"loss/loss": 1.0}, 1)
    child.finish()
    assert steps_of(client, child.run_id, "loss/loss") == [1]
    run = client.get_run(sweep.run_id)
    assert run.data.metrics == {} and not run.inputs.dataset_inputs


def test_a_pipeline_opens_its_run_by_a_process(client: MlflowClient) -> None:
    order = {"experiment": "r2id", "name": "digits", "params": {}, "run": None}
    done = subprocess.run(
        [sys.executable, "-m", "r2id.training.tracking.pipeline", "begin"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        check=True,
    )
    assert client.get_run(json.loads(done.stdout)["run"]).data.tags["stage"] == "pipeline"
