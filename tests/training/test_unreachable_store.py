"""A store that is unreachable, locked or killed: training goes on, and what it recorded arrives."""

import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from r2id.checkpoints import reading
from r2id.config import load_config
from r2id.mlflow_pages import RUN_ID_FILE
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.conftest import start, steps_of
from tests.training.loop_ranks import at_step
from tests.waiting import free_port, wait_until


def test_an_unreachable_store_delays_nothing_and_warns_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training, askers = threading.current_thread(), set()
    answering = threading.Event()

    def refuse(*_: object) -> None:
        """Refuse the training at once, and any other thread as soon as the store answers."""
        askers.add(threading.current_thread())
        if threading.current_thread() is not training:
            answering.wait()
        raise ConnectionRefusedError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("r2id.training.tracking.tracker._FINISH_SECONDS", 1.0)
    answering.set()
    tracker = start()
    answering.clear()  # until all is recorded: a training that waited for it would not get there
    for step in range(1000):
        tracker.metrics({"loss": 1.0}, step)
    answering.set()
    tracker.finish()
    assert askers and training not in askers
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


def test_a_database_that_was_replaced_gets_everything(
    client: MlflowClient,
    store_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """By a copy of itself, as when a folder is restored."""
    database = tmp_path / "mlflow.db"
    shutil.copy(store_file, database)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    tracker = start()
    tracker.metrics({"loss": 1.0}, 1)
    tracker.tag("recorded", "so far")
    store = MlflowClient(tracking_uri=f"sqlite:///{database}")
    assert tracker.run_id is not None
    run_id = tracker.run_id
    wait_until(lambda: "recorded" in store.get_run(run_id).data.tags)
    database.rename(tmp_path / "moved.db")
    tracker.metrics({"loss": 0.5}, 2)
    said = ""

    def noticed() -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return "cannot be reached" in said

    wait_until(noticed)
    shutil.copy(tmp_path / "moved.db", database)
    tracker.finish()
    assert store.get_run(run_id).info.status == "FINISHED"
    assert steps_of(store, run_id, "loss") == [1, 2]
    assert "Traceback" not in said + capfd.readouterr().err


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

        def noticed() -> bool:
            self.listen()
            return "cannot be reached" in self.said

        wait_until(noticed)
        return run()

    def find(self, _module: object, run: Callable[[], Any]) -> Any:
        self.come_back()
        return run()

    def check(self, client: MlflowClient, run: Path) -> None:
        """Warned once, trained to the end, and recorded everything, under the run's name."""
        assert client.get_run(self.run_id).info.run_name == f"{run.parent.name}/{run.name}"
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
        self.port = str(free_port())
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
        wait_until(self.answers, alive=self.process, said=lambda: "MLflow's server does not start")

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
