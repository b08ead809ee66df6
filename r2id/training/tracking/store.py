"""The MLflow store: reaching it, and opening a run in it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from r2id.mlflow_pages import without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CHANGED = "changed."
"""Beginning of the names of tags with the values of parameters that changed on a resume."""
_DEFAULT_STORE = "sqlite:///mlflow.db"
# What MLflow's pages read: this kind of experiment has runs with charts, not traces of agents.
_KIND, _MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
_PIPELINE = "pipeline"  # the tag ``stage`` of a pipeline's run
# Limits of MLflow's own stores.
_MAX_PARAM_LENGTH = 500
_MAX_PARAMS_PER_BATCH = 100
_MAX_DIGEST_LENGTH = 36


def store_uri() -> str:
    """Return where runs are recorded: MLFLOW_TRACKING_URI, or SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_STORE


def connect() -> MlflowClient:
    """Make a client of the store.

    Unless environment variables say otherwise, it gives up on a dead server within seconds rather
    than minutes, and opens SQLite's file anew each time: one that was replaced could never be
    written to again.
    """
    uri = store_uri()
    defaults = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    if uri.startswith("sqlite"):
        defaults["MLFLOW_SQLALCHEMYSTORE_POOLCLASS"] = "NullPool"
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    import logging

    from mlflow import MlflowClient

    for name in ("alembic", "mlflow"):  # they log pages of migrations at the first start
        logging.getLogger(name).setLevel(logging.WARNING)
    # It logs the stack of every failed attempt, whose error it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    with _one_at_a_time(uri):
        return MlflowClient(tracking_uri=uri)


@contextmanager
def _one_at_a_time(uri: str) -> Iterator[None]:
    """Wait until no other process is here with this store: two cannot both make it in SQLite."""
    if not uri.startswith("sqlite"):
        yield
        return
    place = hashlib.sha256(f"{os.getuid()} {Path.cwd()} {uri}".encode()).hexdigest()
    with (Path(tempfile.gettempdir()) / f"r2id-store-{place[:16]}.lock").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class StoreRefusal(Exception):
    """The store answers, but will not take the run, however often it is asked."""


@dataclass(frozen=True)
class Opened:
    """A run that entries are recorded in."""

    run_id: str
    experiment_id: str
    last_step: Mapping[str, int]
    """The last recorded step of each of its metrics."""


@dataclass
class RunOpening:
    """What is needed to begin or continue a run, kept until the store can be reached."""

    experiment: str
    name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    dataset: tuple[str, str, str] | None = None
    """Its name, digest and location."""
    run_id: str | None = None
    """The run to continue, if it still exists."""
    unfinished: str | None = None
    """A run that this one replaces, because it was killed before its first checkpoint."""
    start_time: int | None = None
    """When a new run began, in milliseconds since 1970; None: now."""

    def open(self, client: MlflowClient) -> Opened:
        """Begin or continue the run."""
        self._end_unfinished(client)
        # Kept at once: after a failure below, the next attempt must not create a second run.
        run_id = self.run_id = self._existing(client) or self._create(client)
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING", name=self.name)
        for key, value in self.tags.items():
            client.set_tag(run_id, key, value)
        self._log_params(client, run_id, run.data.params, run.data.tags)
        _mark_experiment(client, run.info.experiment_id)
        if self.dataset:
            _log_dataset(client, run, *self.dataset)
        return _opened(client, run)

    def open_pipeline(self, client: MlflowClient) -> Opened | None:
        """Return the pipeline's run that this run is a stage of, which gets its dataset too.

        None when there is none: also when the parent is another run, which a user has named.
        """
        parent = self.tags.get("mlflow.parentRunId")
        run = client.get_run(parent) if parent else None
        if run is None or run.data.tags.get("stage") != _PIPELINE:
            return None
        if self.dataset:
            _log_dataset(client, run, *self.dataset)
        return _opened(client, run)

    def _existing(self, client: MlflowClient) -> str | None:
        """Return the id of the run to continue; None when there is none or it was deleted."""
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

    def _end_unfinished(self, client: MlflowClient) -> None:
        from mlflow.exceptions import MlflowException

        if self.unfinished is None:
            return
        try:
            if client.get_run(self.unfinished).info.status == "RUNNING":
                client.set_terminated(self.unfinished, "KILLED")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise

    def _create(self, client: MlflowClient) -> str:
        """Create a run, and its experiment if need be; return the run's id.

        It is created in its parent's experiment if it has one: MLflow shows it only there.
        """
        from mlflow.exceptions import MlflowException

        create = partial(client.create_run, start_time=self.start_time, run_name=self.name)
        if parent := self.tags.get("mlflow.parentRunId"):
            experiment_id = client.get_run(parent).info.experiment_id
            return create(experiment_id).info.run_id
        experiment = client.get_experiment_by_name(self.experiment)
        if experiment is None:
            try:
                experiment_id = client.create_experiment(self.experiment)
            except MlflowException:  # another process may have created it meanwhile
                experiment = client.get_experiment_by_name(self.experiment)
                if experiment is None:
                    raise
        if experiment is not None:
            if experiment.lifecycle_stage != "active":
                raise StoreRefusal(
                    f"experiment {self.experiment!r} has been deleted: restore it, or choose "
                    "another tracking.experiment"
                )
            experiment_id = experiment.experiment_id
        return create(experiment_id).info.run_id

    def _log_params(
        self,
        client: MlflowClient,
        run_id: str,
        recorded: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        from mlflow.entities import Param

        values = {key: value[:_MAX_PARAM_LENGTH] for key, value in self.params.items()}
        # MLflow refuses to change a parameter, so that a continued run keeps its first values; what
        # has changed since is a tag.
        for key, value in values.items():
            tag = f"{CHANGED}{key}"
            if tags.get(tag, recorded.get(key, value)) != value:
                client.set_tag(run_id, tag, value)
        params = [Param(key, value) for key, value in values.items() if key not in recorded]
        for begin in range(0, len(params), _MAX_PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[begin : begin + _MAX_PARAMS_PER_BATCH])


def _opened(client: MlflowClient, run: Run) -> Opened:
    run_id = run.info.run_id
    last = {
        key: max(point.step for point in client.get_metric_history(run_id, key))
        for key in run.data.metrics
    }
    return Opened(run_id, run.info.experiment_id, last)


def _mark_experiment(client: MlflowClient, experiment_id: str) -> None:
    """Mark an experiment as model training, unless somebody has marked it."""
    if _KIND not in client.get_experiment(experiment_id).tags:
        client.set_experiment_tag(experiment_id, _KIND, _MODEL_TRAINING)


def _log_dataset(client: MlflowClient, run: Run, name: str, digest: str, location: str) -> None:
    """Record the dataset of a run that has none yet."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if run.inputs and run.inputs.dataset_inputs:
        return
    source = json.dumps({"uri": location})
    dataset = Dataset(
        name=name, digest=digest[:_MAX_DIGEST_LENGTH], source_type="local", source=source
    )
    dataset_input = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
    client.log_inputs(run.info.run_id, datasets=[dataset_input])
    client.set_tag(run.info.run_id, "dataset.digest", digest)  # in full


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type when the message is empty.

    Addresses in it, such as that of the store, lose their passwords.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return without_password(line)[:300]


def refuses(error: Exception) -> bool:
    """Tell whether the store has answered, and will never take what it was asked to."""
    return isinstance(error, StoreRefusal) or getattr(error, "error_code", None) in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
    )


def answers(client: MlflowClient, run_id: str) -> bool:
    """Tell whether the store answers now, so that only its files cannot be written."""
    try:
        client.get_run(run_id)
    except Exception:
        return False
    return True
