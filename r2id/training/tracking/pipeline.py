"""The MLflow run of a pipeline; the runs of its stages are child runs of it.

``python -m r2id.training.tracking.pipeline begin|end`` reads a request as JSON from stdin and
prints the run's id. A pipeline runs it in a process of its own, because pipelines import no mlflow.
Its training stages find the run's id in the environment variable R2ID_PARENT_RUN.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from r2id.progress import say
from r2id.training.tracking.facts import flatten, git_tags
from r2id.training.tracking.store import RunOpening, connect, first_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

_MAX_METRICS_PER_BATCH = 1000  # limit of MLflow's own stores


def begin_pipeline(request: Mapping[str, Any]) -> str:
    """Begin the run of a pipeline, or continue ``request["run"]``; return its id.

    ``request`` also has experiment, name and params.
    """
    tags = {"stage": "pipeline", **git_tags()}
    opening = RunOpening(
        request["experiment"],
        request["name"],
        flatten(request["params"]),
        tags,
        run_id=request["run"],
    )
    return opening.open(connect())[0]


def end_pipeline(request: Mapping[str, Any]) -> str:
    """End the run of a pipeline, and record the stages that do not record themselves.

    ``request`` has run, status and stages. Each stage has name, params, metrics and artifacts
    (paths), and becomes a child run. Its metrics are recorded in the pipeline's own run too.
    """
    client = connect()
    parent = client.get_run(request["run"])
    for stage in request["stages"]:
        child = _open_child(client, parent, stage)
        for run_id in (child, parent.info.run_id):
            _log_numbers(client, run_id, stage["metrics"])
        for path in map(Path, stage["artifacts"]):
            record = client.log_artifacts if path.is_dir() else client.log_artifact
            record(child, str(path))
        client.set_terminated(child)
    client.set_terminated(parent.info.run_id, request["status"])
    return parent.info.run_id


def _open_child(client: MlflowClient, parent: Any, stage: Mapping[str, Any]) -> str:
    """Open a stage's run: the one from an earlier start of the pipeline, or else a new one."""
    parent_id, name = parent.info.run_id, stage["name"]
    existing = client.search_runs(
        [parent.info.experiment_id],
        max_results=1,
        filter_string=f"tags.`mlflow.parentRunId` = '{parent_id}' and tags.stage = '{name}'",
    )
    opening = RunOpening(
        client.get_experiment(parent.info.experiment_id).name,
        name,
        flatten(stage["params"]),
        {"stage": name, "mlflow.parentRunId": parent_id, **git_tags()},
        run_id=existing[0].info.run_id if existing else None,
    )
    return opening.open(client)[0]


def _log_numbers(client: MlflowClient, run_id: str, table: Mapping[str, Any]) -> None:
    """Record the numbers of a nested table, under names that MLflow allows."""
    from mlflow.entities import Metric

    now, numbers = int(time.time() * 1000), {}
    for key, text in flatten(table).items():
        with contextlib.suppress(ValueError):  # raised by text that is no number
            numbers[re.sub(r"[^\w./ -]", "_", key)] = float(text)
    metrics = [Metric(key, value, now, 0) for key, value in numbers.items()]
    client.log_batch(run_id, metrics=metrics[:_MAX_METRICS_PER_BATCH])


def main() -> int:
    """Carry out the request on stdin; return the exit code: 0, or 1 when MLflow fails."""
    try:
        print({"begin": begin_pipeline, "end": end_pipeline}[sys.argv[1]](json.load(sys.stdin)))
        return 0
    except Exception as error:  # the pipeline goes on without tracking
        say(f"tracking: {first_line(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
