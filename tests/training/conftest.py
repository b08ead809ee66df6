"""Two ranks, and a store of MLflow, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from r2id.config import TrackingConfig
from r2id.training.tracking import PARENT_VARIABLE, NullTracker, Tracker
from tests.training.children import Ranks

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(scope="package")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Two processes of one job, which stay for all tests."""
    pair = Ranks(2, tmp_path_factory.mktemp("ranks") / "stdout")
    yield pair
    pair.close()
    if pair.output.exists():
        assert not pair.output.read_bytes(), "stdout is for results"


@pytest.fixture(scope="session")
def store_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for all tests of a process: creating its tables takes seconds.

    Nor would a second one do: MLflow keeps the store that it has opened by a relative address.
    """
    return tmp_path_factory.mktemp("mlflow") / "mlflow.db"


@pytest.fixture
def client(store_file: Path, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    from mlflow import MlflowClient

    monkeypatch.chdir(store_file.parent)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv(PARENT_VARIABLE, raising=False)
    return MlflowClient(tracking_uri=f"sqlite:///{store_file}")


def start(**arguments) -> NullTracker:
    """Begin a training's run in the store."""
    return Tracker.start(TrackingConfig(), **{"run_name": "riae", "stage": "riae", **arguments})


def steps_of(client: MlflowClient, run_id: str, key: str) -> list[int]:
    """Return the steps at which a run has a value of a metric."""
    return [point.step for point in client.get_metric_history(run_id, key)]
