"""Prefect flows, one for each stage: paths in, results out.

Results are files, so Prefect caches nothing. Each stage is safe to run again: it finds finished
work on disk and continues unfinished work.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from pipelines.artifacts import TrainingArtifacts
from pipelines.processes import stage_processes, training_processes
from pipelines.subprocesses import StageCrashed, run_stage, stage_command
from r2id.config import EncodeConfig, EvaluateConfig, SampleConfig, load_config, to_arguments
from r2id.errors import InputError

_RESTARTS = 3  # of a training stage; see _got_further


@task(name="stage", task_run_name="{arguments[0]}", cache_policy=NO_CACHE)
def run_stage_task(
    arguments: Sequence[str], environment: dict[str, str], processes: int = 1
) -> dict[str, Any]:
    """Run a stage's command in ``processes`` processes and return its result."""
    return run_stage(arguments, processes=processes, environment=environment)


def _got_further(_task: object, _run: TaskRun, state: State[Any]) -> bool:
    """Return whether to restart a failed training: only if it saved a new checkpoint first.

    Without a new checkpoint, it would most likely crash at the same step again.
    """
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageCrashed) and error.got_further


@task(
    name="train",
    task_run_name="train {config}",
    cache_policy=NO_CACHE,
    retries=_RESTARTS,
    retry_delay_seconds=2,
    retry_condition_fn=_got_further,
)
def train_task(
    config: Path, overrides: Sequence[str], environment: dict[str, str]
) -> dict[str, Any]:
    """Train one stage, and show its artifacts; pipelines.processes says in how many processes."""
    run = load_config(config, overrides)
    if run.stage == "pipeline":
        raise InputError(
            f"{config}: stage 'pipeline': train takes the config of one stage, 'riae' or 'r2id'"
        )
    pointer = run.run / "checkpoints" / "latest"
    before = pointer.read_text(encoding="utf-8") if pointer.exists() else None
    arguments = ["train", str(config), *overrides]
    processes = training_processes(run.train, tell=True)
    try:
        with TrainingArtifacts(run, stage_command(arguments, processes), environment) as shown:
            shown.result = run_stage(arguments, processes=processes, environment=shown.environment)
        return shown.result
    except StageCrashed as crash:
        crash.got_further = pointer.exists() and pointer.read_text(encoding="utf-8") != before
        raise


@flow(name="train", flow_run_name="train {config}", validate_parameters=False)
def train_flow(
    config: Path, overrides: Sequence[str] = (), environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Train one stage on the GPUs of this machine; a crash after a new checkpoint restarts it.

    Shows progress, command, MLflow run, checkpoint and figures as artifacts while it runs.
    """
    return train_task(config, tuple(overrides), environment or {})


@flow(name="encode", flow_run_name="encode {shards}", validate_parameters=False)
def encode_flow(
    riae: Path,
    shards: Path,
    out: Path,
    config: EncodeConfig,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Encode a whole dataset into latents, on all GPUs of this machine."""
    paths = ["--riae", str(riae), "--shards", str(shards), "--out", str(out)]
    arguments = ["encode", *paths, *to_arguments(config)]
    return run_stage_task(arguments, environment or {}, stage_processes())


@flow(name="sample", flow_run_name="sample {checkpoint}", validate_parameters=False)
def sample_flow(
    checkpoint: Path, out: Path, config: SampleConfig, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Draw one grid of samples per size, replacing the files in ``out``.

    Settings that ``config`` leaves open come from the run's own config.
    """
    paths = [str(checkpoint), "--out", str(out)]
    return run_stage_task(
        ["sample", *paths, "--overwrite", *to_arguments(config)], environment or {}
    )


@flow(name="evaluate", flow_run_name="evaluate {checkpoint}", validate_parameters=False)
def evaluate_flow(
    checkpoint: Path,
    shards: Path,
    out: Path,
    config: EvaluateConfig,
    environment: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint: metrics, figures and report."""
    paths = ["--shards", str(shards), "--out", str(out)]
    return run_stage_task(
        ["evaluate", str(checkpoint), *paths, *to_arguments(config)], environment or {}
    )
