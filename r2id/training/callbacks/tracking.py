"""Recording a run in MLflow: its parameters, losses and rates, and where its checkpoint is."""

from __future__ import annotations

import os
from collections.abc import Mapping

from r2id import dist
from r2id.errors import Stopped
from r2id.mlflow_pages import RUN_ID_FILE, read_run_ids
from r2id.training.callbacks.base import Callback
from r2id.training.meter import RATES
from r2id.training.state import TrainState
from r2id.training.tracking import PARENT_VARIABLE, NullTracker, Tracker


class Tracking(Callback):
    """Give the state of rank 0 a tracker, and record the figures of logged steps."""

    def pre_train(self, state: TrainState) -> None:
        if dist.is_main():
            state.tracker = _start_tracker(state)

    def post_step(self, state: TrainState) -> None:
        if state.log_due:
            figures = {**state.figures, "lr": state.lr, "grad_norm": float(state.grad_norm)}
            if state.skipped:
                figures["skipped_steps"] = state.skipped
            state.tracker.metrics(grouped(figures), state.step)

    def close(self, state: TrainState, error: BaseException | None) -> None:
        if error is None:
            state.tracker.finish("FINISHED")
        else:
            state.tracker.finish("KILLED" if isinstance(error, Stopped) else "FAILED")


def grouped(figures: Mapping[str, float]) -> dict[str, float]:
    """Put figures into groups, ``group/name``: MLflow shows the charts of a group together."""
    groups = {"lr": "optimizer", "grad_norm": "optimizer", "skipped_steps": "optimizer"}
    groups |= dict.fromkeys(RATES, "speed")
    return {
        name if "/" in name else f"{groups.get(name, 'loss')}/{name}": value
        for name, value in figures.items()
    }


def _start_tracker(state: TrainState) -> NullTracker:
    """Begin or continue the MLflow run of the run directory, which keeps its id in a file."""
    config, shards = state.config, state.task.shards
    folder = state.folder.resolve()
    # Within a pipeline's run the stage is enough. By itself it would be the name of every run.
    name = folder.name if PARENT_VARIABLE in os.environ else f"{folder.parent.name}/{folder.name}"
    id_file = state.folder / RUN_ID_FILE
    run_id = read_run_ids(id_file)[0]
    return Tracker.start(
        config.tracking,
        run_name=name,
        stage=config.stage,
        params=config.model_dump(mode="json"),
        run_id=run_id if state.start else None,
        unfinished=None if state.start else run_id,
        tags={f"fact.{key}": str(value) for key, value in state.task.facts.items()},
        dataset=(shards.manifest.dataset, shards.digest, str(config.data.shards)),
        id_file=id_file,
    )
