"""The tracker of a training run.

One background thread records everything, in order. When the store cannot be reached, it warns once,
and the entries wait and are tried again: a tracker never stops or slows the training.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from r2id.config import TrackingConfig
from r2id.files import write_atomic
from r2id.mlflow_pages import how_to_open
from r2id.progress import say
from r2id.training.tracking.facts import flatten, git_tags
from r2id.training.tracking.store import Opened, RunOpening, answers, connect, first_line, refuses

if TYPE_CHECKING:
    import numpy as np
    from mlflow import MlflowClient
    from PIL.Image import Image

PARENT_VARIABLE = "R2ID_PARENT_RUN"
"""Environment variable with the id of the MLflow run that a new run is a child of."""
Status = Literal["FINISHED", "FAILED", "KILLED"]

_START_SECONDS = 60.0  # a new SQLite store takes a few seconds to create its tables
_FINISH_SECONDS = 20.0
_KILLED_SECONDS = 4.0  # a scheduler that has sent SIGTERM does not wait for long
_LONGEST_PAUSE = 30.0  # seconds between attempts


class NullTracker:
    """Records nothing. Used where tracking is switched off, and on every rank but the first."""

    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Record finite numbers at a step, unless an earlier process has recorded that step."""

    def image(self, picture: Path | Image | np.ndarray, name: str, step: int | None = None) -> None:
        """Record a picture: a file, an image, or an array uint8 [H, W] or [H, W, C].

        It replaces an earlier picture of the same name and step. The newest one of each name is
        shown among the charts of the run.
        """

    def tag(self, name: str, value: str) -> None:
        """Record a fact that may change during the run, such as where the last checkpoint is."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Record how the run ended, and wait a limited time until everything is recorded."""


class Tracker(NullTracker):
    """A run in MLflow. ``run_id`` is None until the store has been reached.

    Figures, pictures and files of a pipeline's stage are recorded in the pipeline's run too, under
    the name of the stage's run directory, so that one page shows all of a pipeline.
    """

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
        unfinished: str | None = None,
        id_file: Path | None = None,
    ) -> NullTracker:
        """Begin a run, or continue ``run_id`` when that run still exists.

        ``run_name`` is the name of the run unless the config has one, and that under which a
        pipeline's run holds the figures of this one.
        ``params`` is a config as nested dictionaries, recorded as ``section.key``. ``dataset`` is
        its name, digest and location. ``unfinished`` is a run that this one replaces, because it
        was killed before its first checkpoint. The run in R2ID_PARENT_RUN, if any, becomes the
        parent. The run's id is written to ``id_file`` as soon as it is known, however late the
        store is reached.
        """
        if not config.enabled:
            return NullTracker()
        tags = {"stage": stage, **git_tags(), **(tags or {})}
        if parent_id := os.environ.get(PARENT_VARIABLE):
            tags["mlflow.parentRunId"] = parent_id
        name, params = config.name or run_name, flatten(params or {})
        opening = RunOpening(config.experiment, name, params, tags, dataset, run_id, unfinished)
        return cls(opening, run_name, id_file)

    def __init__(self, opening: RunOpening, folder: str, id_file: Path | None = None) -> None:
        self._jobs: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._client: MlflowClient | None = None
        self._id_file = id_file
        self._own: Opened | None = None
        self._pipeline: Opened | None = None
        self._prefix = f"{folder}/"
        self._has_parent = "mlflow.parentRunId" in opening.tags
        self._said: set[str] = set()
        self._asked = self._done = 0  # entries
        self._refused = self._ended = False
        self._deadline = math.inf
        self._closing = threading.Event()
        self._tried_once = threading.Event()
        self._jobs.put(lambda: self._open(opening))
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        # Wait for the first attempt only, so that a store that answers has the run from the start.
        self._tried_once.wait(_START_SECONDS)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        # MLflow keeps an infinite value as the largest number, and pages of runs with a NaN may not
        # load.
        numbers = {key: float(value) for key, value in values.items() if math.isfinite(value)}
        self._put_everywhere(lambda run, prefix: self._log_metrics(run, prefix, numbers, step, now))

    def image(self, picture: Path | Image | np.ndarray, name: str, step: int | None = None) -> None:
        # Copied now, because the caller may change the array or the file before the thread records
        # it.
        image = _as_image(picture)
        file = f"{name}.png" if step is None else f"{name}/{step:08d}.png"
        self._put_everywhere(
            lambda run, prefix: self._log_image(run, prefix, image, name, file), is_file=True
        )

    def tag(self, name: str, value: str) -> None:
        self._put(lambda: self._store().set_tag(self._run().run_id, name, value))

    def finish(self, status: Status = "FINISHED") -> None:
        if self._closing.is_set():
            return

        def end() -> None:
            self._store().set_terminated(self._run().run_id, status)
            self._ended = True

        self._jobs.put(end)
        self._jobs.put(None)
        limit = _KILLED_SECONDS if status == "KILLED" else _FINISH_SECONDS
        self._deadline = time.monotonic() + limit
        self._closing.set()
        self._thread.join(limit + 1.0)  # no longer, even if an attempt hangs
        lost = self._asked - self._done
        if not self._refused and (lost or not self._ended):
            entries = f"{lost} entries, and " if lost else ""
            say(f"tracking: {entries}how the run ended, could not be recorded: lost")

    def _put_everywhere(
        self, entry: Callable[[Opened, str], object], is_file: bool = False
    ) -> None:
        """Have an entry recorded in this run, and in the pipeline's with a prefix."""
        self._put(lambda: entry(self._run(), ""), is_file)
        if self._has_parent:  # an entry of its own, because each is tried until it is recorded
            self._put(lambda: self._pipeline and entry(self._pipeline, self._prefix), is_file)

    def _put(self, entry: Callable[[], object], is_file: bool = False) -> None:
        """Have an entry recorded after those before it.

        Files are kept elsewhere than figures: one that cannot be written while the store answers is
        left out, since all entries after it would wait for it.
        """
        if self._refused:
            return

        def record() -> None:
            try:
                entry()
            except Exception as error:
                answered = is_file and answers(self._store(), self._run().run_id)
                if not (answered or _hopeless(error)):
                    raise
                self._say("an entry is left out", first_line(error))
            self._done += 1

        self._asked += 1
        self._jobs.put(record)

    def _store(self) -> MlflowClient:
        assert self._client is not None
        return self._client

    def _run(self) -> Opened:
        assert self._own is not None
        return self._own

    def _open(self, opening: RunOpening) -> None:
        self._client = self._client or connect()
        self._own = opening.open(self._client)
        self._pipeline = opening.open_pipeline(self._client)
        run_id, experiment = self._own.run_id, self._own.experiment_id
        if self._id_file is not None:
            write_atomic(self._id_file, f"{run_id}\n{experiment}\n".encode())
        self.run_id = run_id
        if not self._has_parent:  # a pipeline says where its own run is
            say(f"MLflow: {how_to_open(experiment, run_id)}")

    def _log_metrics(
        self, run: Opened, prefix: str, values: Mapping[str, float], step: int, now: int
    ) -> None:
        from mlflow.entities import Metric

        def last_step(key: str) -> int:
            # Later steps in the pipeline's run are those of a training that was removed since.
            own = self._run().last_step.get(key, -1)
            return min(own, run.last_step.get(f"{prefix}{key}", -1))

        fresh = [
            Metric(f"{prefix}{key}", value, now, step)
            for key, value in values.items()
            if step > last_step(key)
        ]
        if fresh:
            self._store().log_batch(run.run_id, metrics=fresh)

    def _log_image(self, run: Opened, prefix: str, image: Image, name: str, file: str) -> None:
        """Record a picture as a file, and again as the one that is shown among the charts.

        MLflow's page first shows the picture of step 0 in the grid for a name, and reads name and
        step from the names of two files, whatever stands behind them.
        """
        client = self._store()
        client.log_image(run.run_id, image, artifact_file=f"{prefix}{file}")
        shown = f"{prefix}pictures/{name}".replace("/", "~") + "+step+0+timestamp+0+newest"
        for ending in (".png", "+compressed.webp"):
            client.log_image(run.run_id, image, artifact_file=f"images/{shown}{ending}")
        client.set_tag(run.run_id, "mlflow.loggedImages", "True")

    def _work(self) -> None:
        """Do the jobs in order until ``finish`` ends it. The thread runs this method."""
        while (job := self._jobs.get()) is not None:
            if not self._attempt(job):
                return

    def _attempt(self, job: Callable[[], object]) -> bool:
        """Try a job until it is done → True, or until there is no use or time left → False."""
        pause = 1.0
        while True:
            try:
                job()
                return True
            except Exception as error:  # whatever goes wrong in tracking, training goes on
                if refuses(error):  # to open or to end the run
                    self._refused = True
                    say(f"tracking: the run is not recorded: {first_line(error)}")
                    return False
                self._say(
                    "MLflow cannot be reached, going on and trying again later", first_line(error)
                )
            finally:
                self._tried_once.set()
            if time.monotonic() > self._deadline:
                return False
            if self._closing.wait(pause):
                time.sleep(1.0)  # ``wait`` returns at once from now on; keep trying every second
            else:
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _say(self, what: str, why: str) -> None:
        """Say what went wrong once, not at every step."""
        if what not in self._said:
            self._said.add(what)
            say(f"tracking: {what}: {why}")


def _as_image(picture: Path | Image | np.ndarray) -> Image:
    from PIL import Image

    if isinstance(picture, Path):
        with Image.open(picture) as image:
            return image.copy()
    return picture.copy() if isinstance(picture, Image.Image) else Image.fromarray(picture)


def _hopeless(error: Exception) -> bool:
    """Tell whether trying again is of no use, because the entry is wrong and not the store."""
    wrong = (IsADirectoryError, TypeError, ValueError)
    return refuses(error) or isinstance(error, wrong)
