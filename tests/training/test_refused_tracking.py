"""What a store does not take, however often it is asked, holds nobody up."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from r2id.config import TrackingConfig
from r2id.training.tracking import PARENT_VARIABLE, Tracker


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    # By its whole path, because MLflow keeps stores open by their address, which may be relative.
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    return MlflowClient(tracking_uri=store)


def test_an_experiment_that_was_deleted_holds_nothing_up(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under a run, and before one: said once, and nobody waits for what will not come back."""

    def told() -> list[str]:
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if line.startswith("tracking:")]

    config = TrackingConfig(experiment="doomed")
    tracker = Tracker.start(config, run_name="riae", stage="riae")
    tracker.metrics({"loss": 1.0}, 1)
    while tracker.run_id is None or not client.get_metric_history(tracker.run_id, "loss"):
        time.sleep(0.05)
    client.delete_experiment(client.get_experiment_by_name("doomed").experiment_id)
    began = time.monotonic()
    for step in range(2, 100):
        tracker.metrics({"loss": 1.0}, step)
    tracker.finish()
    assert [line for line in told() if "left out" in line][1:] == []
    for _ in range(2):
        refused = Tracker.start(config, run_name="r2id", stage="r2id")
        refused.metrics({"loss": 1.0}, 1)
        refused.finish()
        assert refused.run_id is None
        (line,) = told()
        assert "'doomed' has been deleted" in line and "tracking.experiment" in line
    assert time.monotonic() - began < 10.0
