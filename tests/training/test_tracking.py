"""What a training and a pipeline record in MLflow, against a real SQLite store."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from r2id.config import TrackingConfig, load_config
from r2id.mlflow_pages import (
    RUN_ID_FILE,
    how_to_open,
    read_run_ids,
    run_page,
    server_address,
    server_command,
)
from r2id.training.loop import train
from r2id.training.reachable import find_store
from r2id.training.tracking import Tracker
from r2id.training.tracking.facts import flatten, git_tags
from r2id.training.tracking.newest import newest_page
from r2id.training.tracking.pipeline import begin_pipeline, end_pipeline
from r2id.training.tracking.store import first_line
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.conftest import start, steps_of


def test_records_parameters_dataset_metrics_and_pictures(client: MlflowClient) -> None:
    params = {
        "seed": 0,
        "train": {"steps": 10, "long": "x" * 900},
        "many": {str(i): i for i in range(150)},
    }
    tracker = start(
        params=params, tags={"colour": "blue"}, dataset=("digits", "d" * 64, "data/digits")
    )
    for step in (1, 2):
        tracker.metrics({"loss": 1 / step, "lr": 0.1}, step)
    tracker.metrics({"loss": float("nan"), "grad_norm": float("inf")}, 3)
    for step in (1, 2):
        tracker.image(np.full((4, 6, 3), 100 * step, np.uint8), "samples", step)
    tracker.image(Image.new("L", (5, 5)), "film")
    tracker.tag("checkpoint", "runs/x")
    tracker.finish()

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == "10"
    assert len(run.data.params["train.long"]) == 500
    assert len(run.data.params) == 153
    assert (
        run.data.tags.items()
        >= {
            "stage": "riae",
            "colour": "blue",
            "checkpoint": "runs/x",
            "dataset.digest": "d" * 64,
        }.items()
    )
    assert run.inputs.dataset_inputs[0].dataset.name == "digits"
    assert set(run.data.metrics) == {"loss", "lr"}
    assert steps_of(client, tracker.run_id, "loss") == [1, 2]
    files = {
        file.path
        for folder in (None, "samples")
        for file in client.list_artifacts(tracker.run_id, folder)
        if not file.is_dir
    }
    assert files == {"samples/00000001.png", "samples/00000002.png", "film.png"}


def test_the_newest_picture_of_each_name_is_among_the_charts(
    client: MlflowClient, tmp_path: Path
) -> None:
    """In files that MLflow's page takes for pictures of step 0, the step it shows first."""
    tracker = start()
    for step in (10, 20):
        tracker.image(np.full((4, 6, 3), 10 * step, np.uint8), "samples", step)
    tracker.finish()
    files = sorted(Path(file.path) for file in client.list_artifacts(tracker.run_id, "images"))
    assert len(files) == 2
    for file in files:
        key, step_word, step, time_word, timestamp, *_ = file.stem.split("+")
        assert (step_word, time_word) == ("step", "timestamp") and timestamp.isdigit()
        assert (key.replace("~", "/"), step) == ("pictures/samples", "0")
        with Image.open(client.download_artifacts(tracker.run_id, str(file), tmp_path)) as shown:
            assert np.allclose(np.asarray(shown.convert("RGB")), 200, atol=2)
    assert client.get_run(tracker.run_id).data.tags["mlflow.loggedImages"] == "True"


def test_the_experiment_is_marked_as_model_training(client: MlflowClient) -> None:
    """Unless its owner has marked it as something else."""
    kind = "mlflow.experimentKind"
    for name, before in (("unmarked", None), ("marked", "regression")):
        if before:
            client.set_experiment_tag(client.create_experiment(name), kind, before)
        Tracker.start(TrackingConfig(experiment=name), run_name="riae", stage="riae").finish()
        found = client.get_experiment_by_name(name).tags[kind]
        assert found == (before or "custom_model_development")


def test_the_address_of_the_run_is_said(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start(id_file=tmp_path / RUN_ID_FILE)
    tracker.finish()
    experiment = client.get_run(tracker.run_id).info.experiment_id
    page = f"http://127.0.0.1:5000/#/experiments/{experiment}/runs/{tracker.run_id}/"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "MLflow:" in line]
    assert f"then {page}" in line and "mlflow" in line.partition("then")[0]
    assert read_run_ids(tmp_path / RUN_ID_FILE) == (tracker.run_id, experiment)
    assert newest_page("http://here/") == run_page(
        experiment, tracker.run_id, server="http://here/"
    )


def test_the_command_that_shows_a_run_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)  # no checkout, so that there is no launch/mlflow.sh
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs))
    rest = "server --backend-store-uri sqlite:///mlflow.db"
    assert server_command() == f"bin/python -m mlflow {rest}"
    (programs / "mlflow").write_text("#!/bin/sh\n")
    (programs / "mlflow").chmod(0o755)
    assert server_command() == f"mlflow {rest}"
    assert how_to_open("1", "abc").startswith(f"to see this run, mlflow {rest}, then http://127.")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "other" / "python"))
    assert server_command() == f"other/python -m mlflow {rest}"


def test_a_continued_run_has_no_step_twice(client: MlflowClient) -> None:
    first = start(params={"lr": 1})
    for step in range(10, 60, 10):
        first.metrics({"loss": 1.0}, step)
    first.finish("KILLED")
    second = start(params={"lr": 2}, run_id=first.run_id)  # MLflow refuses to change a parameter
    for step in range(30, 90, 10):
        second.metrics({"loss": 2.0, "late": 3.0}, step)
    second.finish()

    assert second.run_id == first.run_id
    assert steps_of(client, first.run_id, "loss") == list(range(10, 90, 10))
    assert steps_of(client, first.run_id, "late") == list(range(30, 90, 10))
    run = client.get_run(first.run_id)
    assert (run.info.status, run.data.params["lr"]) == ("FINISHED", "1")
    assert run.data.tags["changed.lr"] == "2"
    start(params={"lr": 1, "new": 5}, run_id=first.run_id).finish()  # back to what it was
    run = client.get_run(first.run_id)
    assert (run.data.tags["changed.lr"], run.data.params["new"]) == ("1", "5")


def test_a_run_that_is_gone_is_begun_anew(client: MlflowClient) -> None:
    gone = start(run_id="0" * 32)
    gone.finish()
    deleted = start()
    deleted.finish()
    client.delete_run(deleted.run_id)
    again = start(run_id=deleted.run_id)
    again.finish()
    assert gone.run_id not in (None, "0" * 32)
    assert again.run_id != deleted.run_id


def test_a_run_that_was_killed_before_its_first_checkpoint_does_not_stay_running(
    client: MlflowClient, digits: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    killed = start(id_file=run / RUN_ID_FILE)
    settings = [*TINY_RIAE, "train.steps=1", "tracking.enabled=true"]
    settings += [f"run={run}", f"data.shards={digits}"]
    train(load_config(CONFIGS / "digits" / "riae.toml", settings))
    anew, _ = read_run_ids(run / RUN_ID_FILE)
    assert anew is not None and anew != killed.run_id
    assert client.get_run(killed.run_id).info.status == "KILLED"
    assert client.get_run(anew).info.status == "FINISHED"
    killed.finish("KILLED")  # its thread
    start(unfinished=anew).finish()
    assert client.get_run(anew).info.status == "FINISHED"
    start(unfinished="0" * 32).finish()


def test_switched_off_records_nothing(client: MlflowClient) -> None:
    tracker = Tracker.start(TrackingConfig(enabled=False), run_name="x", stage="riae")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id is None


def test_a_wrong_entry_is_left_out_and_the_rest_recorded(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start()
    tracker.metrics({"no name of a metric?": 1.0}, 1)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert "left out" in capsys.readouterr().err
    assert steps_of(client, tracker.run_id, "loss") == [1]


@pytest.mark.parametrize("place", ["{folder}/file/artifacts", "mlflow-artifacts:/1"])
def test_files_that_cannot_be_written_hold_nothing_up(
    place: str, client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a project that has moved, or whose experiment a server has made.

    MLflow keeps the old place of an experiment's files, and leaves those of a server to it.
    """
    (tmp_path / "file").write_text("not a folder")
    experiment = Path(place).parts[0]
    client.create_experiment(experiment, artifact_location=place.format(folder=tmp_path))
    tracker = Tracker.start(TrackingConfig(experiment=experiment), run_name="riae", stage="riae")
    tracker.image(np.zeros((4, 6, 3), np.uint8), "samples", 1)
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id is not None
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    assert steps_of(client, tracker.run_id, "loss") == [1]
    begun = begin_pipeline({"experiment": experiment, "name": "digits", "params": {}, "run": None})
    report = tmp_path / "report.html"
    report.write_text("x")
    stage = {
        "name": "evaluate",
        "params": {},
        "times": None,
        "metrics": {"a": 1},
        "artifacts": [str(report)],
    }
    end = {"stages": [stage], "headlines": ["good"], "pictures": [], "status": "FINISHED"}
    end_pipeline({**end, "run": begun["run"]})
    assert client.get_run(begun["run"]).info.status == "FINISHED"
    said = capsys.readouterr().err
    assert "an entry is left out" in said and "files of evaluate are left out" in said
    assert "cannot be reached" not in said


def test_no_password_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    error = Exception("API request to http://alice:s3c@ret@127.0.0.1:9/api@2 failed\nmore")
    assert first_line(error) == "API request to http://127.0.0.1:9/api@2 failed"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://alice:s3cret@tracking/mlflow/")
    assert server_address() == "https://tracking/mlflow"
    assert find_store()[0] == "https://tracking/mlflow/"


def test_flatten_names_nested_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, 2]}) == {
        "a.b": "1",
        "a.c": "{}",
        "d": "[1, 2]",
    }


def test_the_commit_is_that_of_this_checkout() -> None:
    tags = git_tags()
    if not tags:
        pytest.skip("the package is not in a git checkout")
    assert len(tags["mlflow.source.git.commit"]) == 40


def test_importing_it_loads_neither_torch_nor_mlflow() -> None:
    modules = "r2id.training.tracking, r2id.training.tracking.pipeline"
    code = f"import sys, {modules}; sys.exit(bool({{'torch', 'mlflow'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)
