"""The MLflow store: how it is reached, and how a run in it is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

_DEFAULT_STORE = "sqlite:///mlflow.db"
_MAX_PARAM_LENGTH = 500  # limits of MLflow's own stores
_MAX_PARAMS_PER_BATCH = 100
_MAX_DIGEST_LENGTH = 36


def store_uri() -> str:
    """Return where runs are recorded: MLFLOW_TRACKING_URI, or SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_STORE


def connect() -> MlflowClient:
    """Make a client of the store.

    It neither phones home nor waits minutes for a dead server, unless the user says so.
    """
    for name, value in {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # pages of migrations at the first start
        logging.getLogger(name).setLevel(logging.WARNING)
    return MlflowClient(tracking_uri=store_uri())


@dataclass
class RunOpening:
    """How a run begins or is continued; kept until the store can be reached."""

    experiment: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    dataset: tuple[str, str, str] | None = None
    """Name, digest and place."""
    run_id: str | None = None
    """The run to continue, where it still exists."""

    def open(self, client: MlflowClient) -> tuple[str, dict[str, int]]:
        """Return the run's id, and for each metric the last step that it already has."""
        # Kept at once, so that another try after a failure below goes on with the run just created.
        run_id = self.run_id = self._existing(client) or self._create(client)
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING", name=self.name)
        for key, value in self.tags.items():
            client.set_tag(run_id, key, value)
        self._log_params(client, run_id, known=run.data.params)
        if self.dataset and not (run.inputs and run.inputs.dataset_inputs):
            self._log_dataset(client, run_id, *self.dataset)
        last = {
            key: max(point.step for point in client.get_metric_history(run_id, key))
            for key in run.data.metrics
        }
        return run_id, last

    def _existing(self, client: MlflowClient) -> str | None:
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return self.run_id if run.info.lifecycle_stage == "active" else None

    def _create(self, client: MlflowClient) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                experiment_id = client.create_experiment(self.experiment)
            except MlflowException:  # another process was faster
                experiment = client.get_experiment_by_name(self.experiment)
                if experiment is None:
                    raise
        if experiment is not None:
            experiment_id = experiment.experiment_id
        return client.create_run(experiment_id, run_name=self.name).info.run_id

    def _log_params(self, client: MlflowClient, run_id: str, known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        # A parameter cannot change in MLflow; a continued run keeps those of its beginning.
        params = [
            Param(key, value[:_MAX_PARAM_LENGTH])
            for key, value in self.params.items()
            if key not in known
        ]
        for begin in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[begin : begin + _MAX_PARAMS_PER_BATCH])

    def _log_dataset(
        self, client: MlflowClient, run_id: str, name: str, digest: str, place: str
    ) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = json.dumps({"uri": place})
        dataset = Dataset(
            name=name, digest=digest[:_MAX_DIGEST_LENGTH], source_type="local", source=source
        )
        used = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
        client.log_inputs(run_id, datasets=[used])
        client.set_tag(run_id, "dataset.digest", digest)


def first_line(error: Exception) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
