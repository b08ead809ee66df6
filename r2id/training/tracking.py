"""Experiment tracking: the only module that imports mlflow, and only rank 0 has a Tracker.

Everything is recorded by one background thread, in order. When the store cannot be reached the entries wait and are
tried again, with one warning: a tracker never stops or slows the training.

``python -m r2id.training.tracking begin|end`` opens and closes the run that a pipeline's stages are children of: the
pipeline starts it as a process, and the training stages find the run's id in the variable R2ID_PARENT_RUN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r2id.config import TrackingConfig
from r2id.progress import say

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from PIL.Image import Image

PARENT_VARIABLE = "R2ID_PARENT_RUN"
Status = Literal["FINISHED", "FAILED", "KILLED"]

_DEFAULT_STORE = "sqlite:///mlflow.db"
_MAX_PARAM_LENGTH = 500  # limits of MLflow's own stores
_MAX_PARAMS_PER_BATCH = 100
_START_SECONDS = 60.0  # a new SQLite store takes a few seconds to create its tables
_FINISH_SECONDS = 20.0
_KILLED_SECONDS = 4.0  # a scheduler that has sent SIGTERM does not wait for long
_LONGEST_PAUSE = 30.0


class NullTracker:
    """Records nothing: tracking switched off, and every rank but the first."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers at a step; steps that an earlier process of the same run recorded are skipped."""

    def image(self, picture: Path | Image | np.ndarray, name: str, step: int) -> None:
        """Record a picture (a file, or uint8 [H,W] or [H,W,C]); the same name and step replace the earlier one."""

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Record a file, or a folder with all that it holds."""

    def tag(self, name: str, value: str) -> None:
        """Record a fact that may change during the run, such as where the last checkpoint is."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Record the end and wait for what is still unrecorded, for a limited time."""


class Tracker(NullTracker):
    """A run in MLflow. ``run_id`` is none as long as the store could not be reached."""

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        run_name: str,
        stage: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: tuple[str, str, str] | None = None,
        run_id: str | None = None,
        parent_id: str | None = None,
        note: Path | None = None,
    ) -> NullTracker:
        """Begin a run, or continue ``run_id`` when that run still exists.

        params: a config as nested dictionaries, recorded as ``section.key``. dataset: its name, digest and place.
        parent_id: the run that this one is a child of; without it the one in R2ID_PARENT_RUN, if any.
        note: a file that is to hold the run's id as soon as there is one, however late the store is reached.
        """
        if not config.enabled:
            return NullTracker()
        tags = {"stage": stage, **git_tags(), **(tags or {})}
        parent_id = parent_id or os.environ.get(PARENT_VARIABLE)
        if parent_id:
            tags["mlflow.parentRunId"] = parent_id
        return cls(
            _Opening(
                config.experiment,
                config.name or run_name,
                flatten(params or {}),
                tags,
                dataset,
                run_id,
            ),
            note,
        )

    def __init__(self, opening: _Opening, note: Path | None = None) -> None:
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._client: MlflowClient | None = None
        self._note = note
        self._last_step: dict[str, int] = {}
        self._warned = False
        self._deadline = math.inf
        self._closing = threading.Event()
        self._tried_once = threading.Event()
        self._jobs.put(lambda: self._open(opening))
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        self._tried_once.wait(_START_SECONDS)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        numbers = {key: float(value) for key, value in values.items()}
        self._jobs.put(lambda: self._log_metrics(numbers, step, now))

    def image(self, picture: Path | Image | np.ndarray, name: str, step: int) -> None:
        # Decoded now, because the caller may change the array or the file before the thread comes to it.
        image, file = _as_image(picture), f"{name}/{step:08d}.png"
        self._jobs.put(lambda: self._store().log_image(self._run(), image, artifact_file=file))

    def artifact(self, path: Path, folder: str | None = None) -> None:
        def log() -> None:
            record = self._store().log_artifacts if path.is_dir() else self._store().log_artifact
            record(self._run(), str(path), folder)

        self._jobs.put(log)

    def tag(self, name: str, value: str) -> None:
        self._jobs.put(lambda: self._store().set_tag(self._run(), name, value))

    def finish(self, status: Status = "FINISHED") -> None:
        if self._closing.is_set():
            return
        self._jobs.put(lambda: self._store().set_terminated(self._run(), status))
        self._jobs.put(None)
        limit = _KILLED_SECONDS if status == "KILLED" else _FINISH_SECONDS
        self._deadline = time.monotonic() + limit
        self._closing.set()
        self._thread.join(limit + 1.0)  # and not for an attempt that hangs
        unrecorded = self._jobs.qsize()
        if unrecorded or self._thread.is_alive():
            say(f"tracking: {max(unrecorded, 1)} entries could not be recorded and are lost")

    def _store(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _run(self) -> str:
        assert self.run_id is not None
        return self.run_id

    def _open(self, opening: _Opening) -> None:
        self._client = self._client or connect()
        run_id, self._last_step = opening.open(self._client)
        if self._note is not None:
            self._note.write_text(run_id + "\n")
        self.run_id = run_id

    def _log_metrics(self, values: Mapping[str, float], step: int, now: int) -> None:
        from mlflow.entities import Metric

        fresh = [
            Metric(key, value, now, step)
            for key, value in values.items()
            if step > self._last_step.get(key, -1)
        ]
        if fresh:
            self._store().log_batch(self._run(), metrics=fresh)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not self._attempt(job):
                # Put back for the count of what is lost; the process is about to end.
                self._jobs.put(job)
                return

    def _attempt(self, job: Callable[[], object]) -> bool:
        """Do a job, again and again until it is done; false when the time to finish is over."""
        pause = 1.0
        while True:
            try:
                job()
                return True
            except Exception as error:  # whatever goes wrong in tracking, training goes on
                if self.run_id is not None and _hopeless(error):
                    say(f"tracking: an entry is left out: {_first_line(error)}")
                    return True
                self._warn(error)
            finally:
                self._tried_once.set()
            if time.monotonic() > self._deadline:
                return False
            if self._closing.wait(pause):
                time.sleep(1.0)
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            say(
                f"tracking: MLflow cannot be reached, going on and trying again later: {_first_line(error)}"
            )


class _Opening:
    """How a run begins; kept until the store takes it."""

    def __init__(
        self,
        experiment: str,
        name: str,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        dataset: tuple[str, str, str] | None,
        run_id: str | None,
    ) -> None:
        self.experiment, self.name, self.params, self.tags = experiment, name, params, tags
        self.dataset, self.run_id = dataset, run_id

    def open(self, client: MlflowClient) -> tuple[str, dict[str, int]]:
        """The run's id, and for each metric the last step that it already has."""
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

        dataset = Dataset(
            name=name, digest=digest[:36], source_type="local", source=json.dumps({"uri": place})
        )
        client.log_inputs(
            run_id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
        )
        client.set_tag(run_id, "dataset.digest", digest)


def store_uri() -> str:
    """Where runs are recorded: MLFLOW_TRACKING_URI, or SQLite in the working directory."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _DEFAULT_STORE


def connect() -> MlflowClient:
    """A client of the store; it neither phones home nor waits minutes for a dead server, unless the user says so."""
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


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as ``section.key`` → text."""
    flat: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def git_tags() -> dict[str, str]:
    """The commit of the checkout that this file belongs to; nothing when it is installed elsewhere."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here.parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()

    here = Path(__file__).resolve()
    try:
        git("ls-files", "--error-unmatch", here.name)
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git.dirty": str(dirty).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _as_image(picture: Path | Image | np.ndarray) -> Image:
    from PIL import Image

    if isinstance(picture, Path):
        with Image.open(picture) as image:
            return image.copy()
    return picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _hopeless(error: Exception) -> bool:
    """True when trying again cannot help: the entry itself is wrong, not the store."""
    if isinstance(error, (FileNotFoundError, IsADirectoryError, TypeError, ValueError)):
        return True
    return getattr(error, "error_code", None) in (
        "INVALID_PARAMETER_VALUE",
        "RESOURCE_DOES_NOT_EXIST",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def begin_pipeline(order: Mapping[str, Any]) -> str:
    """Begin the run of a pipeline, or continue ``order["run"]``; ``order`` also has experiment, name and params."""
    tags = {"stage": "pipeline", **git_tags()}
    return _Opening(
        order["experiment"], order["name"], flatten(order["params"]), tags, None, order["run"]
    ).open(connect())[0]


def end_pipeline(order: Mapping[str, Any]) -> str:
    """End the run of a pipeline (``order``: run, status, stages) and record the stages that do not track themselves.

    Each stage has name, params, metrics and artifacts (paths), and becomes a child run: the one of that name that an
    earlier start of the pipeline made, else a new one. The metrics are recorded in the pipeline's own run too.
    """
    client = connect()
    parent = client.get_run(order["run"])
    experiment = client.get_experiment(parent.info.experiment_id).name
    for stage in order["stages"]:
        known = client.search_runs(
            [parent.info.experiment_id],
            max_results=1,
            filter_string=(
                f"tags.`mlflow.parentRunId` = '{parent.info.run_id}' and tags.stage = '{stage['name']}'"
            ),
        )
        tags = {"stage": stage["name"], "mlflow.parentRunId": parent.info.run_id, **git_tags()}
        child, _ = _Opening(
            experiment,
            stage["name"],
            flatten(stage["params"]),
            tags,
            None,
            known[0].info.run_id if known else None,
        ).open(client)
        for run_id in (child, parent.info.run_id):
            _log_numbers(client, run_id, stage["metrics"])
        for path in map(Path, stage["artifacts"]):
            record = client.log_artifacts if path.is_dir() else client.log_artifact
            record(child, str(path))
        client.set_terminated(child)
    client.set_terminated(parent.info.run_id, order["status"])
    return parent.info.run_id


def _log_numbers(client: MlflowClient, run_id: str, table: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    now, numbers = int(time.time() * 1000), {}
    for key, text in flatten(table).items():
        with contextlib.suppress(ValueError):
            numbers[re.sub(r"[^\w./ -]", "_", key)] = float(text)
    client.log_batch(
        run_id, metrics=[Metric(key, value, now, 0) for key, value in numbers.items()][:1000]
    )


def main() -> int:
    """``begin`` or ``end`` with its order as JSON on stdin; prints the run's id. Exit code 1 when MLflow cannot do it."""
    try:
        print({"begin": begin_pipeline, "end": end_pipeline}[sys.argv[1]](json.load(sys.stdin)))
        return 0
    except Exception as error:  # the pipeline goes on without tracking
        say(f"tracking: {_first_line(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
