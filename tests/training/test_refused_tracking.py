"""What a store does not take, however often it is asked, holds nobody up."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from r2id.config import TrackingConfig
from r2id.training.tracking import PARENT_VARIABLE, Tracker
from tests.waiting import wait_until


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
    wait_until(lambda: tracker.run_id and client.get_metric_history(tracker.run_id, "loss"))
    client.delete_experiment(client.get_experiment_by_name("doomed").experiment_id)
    for step in range(2, 100):
        tracker.metrics({"loss": 1.0}, step)
    tracker.finish()
    lines = told()
    assert len([line for line in lines if "left out" in line]) <= 1
    assert not any("trying again" in line for line in lines)
    for _ in range(2):
        refused = Tracker.start(config, run_name="r2id", stage="r2id")
        refused.metrics({"loss": 1.0}, 1)
        refused.finish()
        assert refused.run_id is None
        (line,) = told()
        assert "'doomed' has been deleted" in line and "tracking.experiment" in line
