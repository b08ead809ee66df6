"""The MLflow run of a pipeline, which is the parent of its stages' runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.artifacts import show_mlflow_run
from pipelines.record import Record
from r2id.config import PipelineRun
from r2id.mlflow_pages import how_to_open, run_page, server_command
from r2id.progress import say


class MlflowRun:
    """The run of one pipeline; stages that run with its ``environment`` become its children."""

    def __init__(self, config: PipelineRun, record: Record) -> None:
        self.config, self.record = config, record
        self.environment: dict[str, str] = {}

    def begin(self) -> None:
        """Open the run, if tracking is on."""
        tracking = self.config.tracking
        if not tracking.enabled:
            return
        request = {
            "experiment": tracking.experiment,
            "name": tracking.name or self.config.name,
            "run": self.record.mlflow_run,
            "params": self.config.model_dump(mode="json"),
        }
        if begun := _ask("begin", request):
            self.environment["R2ID_PARENT_RUN"] = begun["run"]
            self.record.set_mlflow_run(begun["run"], begun["experiment"])
            say(f"MLflow: {self.how_to_open()}")
            show_mlflow_run(run_page(begun["experiment"], begun["run"]), server_command())

    def how_to_open(self) -> str | None:
        """Return one line that leads to the run; None when there is none."""
        run = self.record.mlflow_run
        if not self.config.tracking.enabled or not run:
            return None
        return how_to_open(self.record.mlflow_experiment, run)

    def end(self, status: str, headlines: Sequence[str], pictures: Sequence[str]) -> None:
        """Close the run with a status, and add the noted stages that it lacks as its children.

        ``headlines`` and ``pictures`` (names of files in samples/) are for its description. What
        MLflow does not take stays noted, and is added when the pipeline is run again.
        """
        if not self.environment:
            return
        request = {
            "run": self.record.mlflow_run,
            "status": status,
            "stages": self.record.missing_in_mlflow(),
            "headlines": list(headlines),
            "pictures": list(pictures),
        }
        if _ask("end", request):
            self.record.all_recorded()
        else:
            say("MLflow: run the same command again to record what is missing there")


def _ask(verb: str, request: Mapping[str, Any]) -> dict[str, str] | None:
    """Begin or end the pipeline's MLflow run, and return the ids of the run and its experiment.

    It is a process of its own, because importing mlflow takes seconds. Returns None when MLflow
    cannot be reached: the work goes on without it.
    """
    process = subprocess.run(
        [sys.executable, "-m", "r2id.training.tracking.pipeline", verb],
        input=json.dumps(request),
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=False,
    )
    return json.loads(process.stdout) if process.returncode == 0 else None
