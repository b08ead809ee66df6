"""Tracking against a real SQLite store.

What is recorded, what a continued run skips, and what a store does that cannot be reached.
"""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow import MlflowClient
from PIL import Image

from r2id.checkpoints import reading
from r2id.config import TrackingConfig, load_config
from r2id.mlflow_pages import RUN_ID_FILE, read_run_ids, run_page
from r2id.training.loop import train
from r2id.training.tracking import PARENT_VARIABLE, NullTracker, Tracker
from r2id.training.tracking.facts import flatten, git_tags
from r2id.training.tracking.newest import newest_page
from r2id.training.tracking.pipeline import begin_pipeline, end_pipeline
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.loop_ranks import at_step


@pytest.fixture(scope="module")
def store_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the module: creating its tables takes seconds."""
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def client(store_file: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.chdir(store_file.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    return MlflowClient(tracking_uri=f"sqlite:///{store_file}")


def start(**arguments) -> NullTracker:
    return Tracker.start(TrackingConfig(), **{"run_name": "riae", "stage": "riae", **arguments})


def steps_of(client: MlflowClient, run_id: str, key: str) -> list[int]:
    return [point.step for point in client.get_metric_history(run_id, key)]


def test_records_parameters_dataset_metrics_pictures_and_files(
    client: MlflowClient, tmp_path: Path
) -> None:
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
    report = tmp_path / "report"
    report.mkdir()
    (report / "report.html").write_text("<p>")
    tracker.artifact(report, "report")
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
        for folder in (None, "samples", "report")
        for file in client.list_artifacts(tracker.run_id, folder)
        if not file.is_dir
    }
    pictures = {"samples/00000001.png", "samples/00000002.png", "film.png"}
    assert files == {*pictures, "report/report.html"}


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


def test_switched_off_records_nothing(client: MlflowClient) -> None:
    tracker = Tracker.start(TrackingConfig(enabled=False), run_name="x", stage="riae")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert tracker.run_id is None


def test_an_unreachable_store_delays_nothing_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", "http://127.0.0.1:9"
    )  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("r2id.training.tracking.tracker._FINISH_SECONDS", 1.0)
    tracker = start()
    began = time.monotonic()
    for step in range(1000):
        tracker.metrics({"loss": 1.0}, step)
    # One attempt for each would take a thousand seconds; an overloaded machine takes some.
    assert time.monotonic() - began < 60.0
    tracker.finish()
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tracking:")]
    assert len(told) == 2
    assert "cannot be reached" in told[0]
    assert told[1].startswith("tracking: 1000 entries, and how the run ended, ")


def test_a_store_that_comes_back_gets_everything(
    client: MlflowClient, store_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = store_file.parent / "place"
    place.touch()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    id_file = store_file.parent / "id_file"
    tracker = start(id_file=id_file)
    tracker.metrics({"loss": 1.0}, 1)
    assert tracker.run_id is None and not id_file.exists()
    place.unlink()
    place.symlink_to(store_file.parent)
    tracker.metrics({"loss": 0.5}, 2)
    tracker.finish()
    assert tracker.run_id is not None and id_file.read_text().split()[0] == tracker.run_id
    assert steps_of(client, tracker.run_id, "loss") == [1, 2]


class Trouble:
    """A run of ten recorded steps, whose store goes away at step 3 and comes back before step 8."""

    def __init__(
        self,
        digits: Path,
        run: Path,
        go: Callable[[], None],
        come_back: Callable[[], None],
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        self.said, self.go, self.come_back, self.capfd = "", go, come_back, capfd
        settings = [
            *TINY_RIAE,
            "tracking.enabled=true",
            "train.steps=10",
            "train.log_every=1",
            "train.save_every=5",
            f"run={run}",
            f"data.shards={digits}",
        ]
        with at_step(3, self.lose), at_step(5, self.wait), at_step(8, self.find):
            self.result = train(load_config(CONFIGS / "digits" / "riae.toml", settings))
        self.listen()
        self.run_id = (run / RUN_ID_FILE).read_text().split()[0]

    def listen(self) -> None:
        self.said += self.capfd.readouterr().err

    def lose(self, _module: object, run: Callable[[], Any]) -> Any:
        self.go()
        return run()

    def wait(self, _module: object, run: Callable[[], Any]) -> Any:
        """Until the tracker has noticed; the training would be over before."""
        end = time.monotonic() + 60
        while "cannot be reached" not in self.said and time.monotonic() < end:
            time.sleep(0.1)
            self.listen()
        return run()

    def find(self, _module: object, run: Callable[[], Any]) -> Any:
        self.come_back()
        return run()

    def check(self, client: MlflowClient, run: Path) -> None:
        """Warned once, trained to the end, and recorded everything."""
        assert (
            self.said.count("tracking:")
            == self.said.count("MLflow cannot be reached, going on")
            == 1
        ), self.said
        assert self.result["step"] == 10 and not reading.find_damages(run)
        assert steps_of(client, self.run_id, "loss/loss") == list(range(1, 11))
        assert client.get_run(self.run_id).info.status == "FINISHED"


def test_a_locked_database_holds_no_training_up(
    client: MlflowClient,
    store_file: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", f"sqlite:///{store_file}?timeout=0.2"
    )  # SQLite itself waits for 5 s
    start().finish()  # so that the tables are there
    other = sqlite3.connect(store_file, isolation_level=None)
    Trouble(
        digits, tmp_path / "run", lambda: other.execute("BEGIN EXCLUSIVE"), other.rollback, capfd
    ).check(client, tmp_path / "run")
    other.close()


class Server:
    """MLflow's server on a port of its own."""

    def __init__(self, store_file: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.address, self.store_file = f"http://127.0.0.1:{self.port}", store_file
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--workers",
            "1",
            "--backend-store-uri",
            f"sqlite:///{self.store_file}",
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        end = time.monotonic() + 120
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < end, (
                "MLflow's server does not start"
            )
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.mark.slow
def test_a_server_that_is_killed_holds_no_training_up(
    client: MlflowClient,
    store_file: Path,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    server = Server(store_file)
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.address)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        Trouble(digits, tmp_path / "run", server.kill, server.start, capfd).check(
            client, tmp_path / "run"
        )
    finally:
        server.kill()


def test_a_wrong_entry_is_left_out_and_the_rest_recorded(
    client: MlflowClient, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = start()
    tracker.artifact(tmp_path / "nowhere.png")
    tracker.metrics({"loss": 1.0}, 1)
    tracker.finish()
    assert "left out" in capsys.readouterr().err
    assert steps_of(client, tracker.run_id, "loss") == [1]


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
        "metrics": {
            "r2id": {"sizes": {"8x8": {"accuracy": 0.5, "samples": 10}}},
            "riae": {"native": {"psnr": 40.0}},
            "note": "text",
        },
        "artifacts": [str(report)],
    }
    end = {"run": parent, "stages": [stage], "headlines": ["samples at 8x8: class accuracy 0.5"]}
    end_pipeline({**end, "status": "FAILED"})
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
