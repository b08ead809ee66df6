"""Prepare a dataset as a Prefect flow with a task for each shard, on this machine or a cluster.

Written shards stay, even if Prefect's server dies. Shards that its tasks did not write are then
written without it, and a second start continues where the first one stopped.
"""

from __future__ import annotations

import importlib
import io
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from prefect import flow, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.futures import PrefectFuture, as_completed
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner

from data_prep.overview import overview
from data_prep.prepare import ShardPlan, prepare, write_shard, write_shards
from data_prep.readers import check_options, check_source
from data_prep.shard_plan import is_complete
from pipelines.artifacts import LiveArtifact, data_uri
from pipelines.orchestration import describe_error, is_prefect_error, prefect_ready, server_answers
from r2id.config import PrepareConfig
from r2id.errors import InputError, Stopped, WorkError
from r2id.parent_process import exit_with_parent
from r2id.progress import say

_SECONDS_TO_ANSWER = 10.0  # for a cluster
_SECONDS_TO_RETURN = 30.0  # for a server that is started again


@task(name="shard", task_run_name="shard {number}", cache_policy=NO_CACHE)
def shard_task(plan: ShardPlan, number: int) -> dict[str, Any]:
    """Write one shard, in whichever process the task runner chooses."""
    return write_shard(plan, number)


@flow(name="prepare", flow_run_name="prepare {config.dataset}", validate_parameters=False)
def prepare_flow(config: PrepareConfig) -> Path:
    """Write a dataset's shards, and show progress, a table, samples and sizes as artifacts."""
    results: list[dict[str, Any]] = []

    def write_all(plan: ShardPlan, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
        done, total = 0, sum(plan.samples)
        shown = LiveArtifact(
            "progress",
            lambda: create_progress_artifact(
                0.0, key="prepare-progress", description=f"{config.dataset} → {config.out}"
            ),
        )
        for result in _with_or_without_prefect(plan, numbers):
            results.append(result)
            done += result["samples"] + result["rejects"]
            shown.show(100 * done / total, last=done == total)
            yield result

    prepare(config, write_all)
    if results:
        _show(config, results)
    return config.out


def prepare_on_cluster(config: PrepareConfig) -> Path:
    """Set up Prefect and run prepare_flow, on the cluster that ``config.engine`` names.

    Raises InputError when the engine is not installed or its cluster does not answer.
    """
    check_engine(config)
    with prefect_ready():
        try:
            return prepare_flow(config)
        except Exception as error:
            if not is_prefect_error(error) or not is_complete(config.out):
                raise
            say(f"prefect: {describe_error(error)}; the shards are complete")
            return config.out


def check_preparation(config: PrepareConfig) -> None:
    """Raise InputError when a pipeline cannot prepare its data.

    Reasons are an option that the dataset does not take, a missing source, and those of
    check_engine. A set that is finished does without its source.
    """
    try:
        check_options(config)
        if not is_complete(config.out):
            check_source(config)
        check_engine(config)
    except InputError as error:
        raise InputError(f"prepare.{error}") from None


def check_engine(config: PrepareConfig) -> None:
    """Raise InputError when the engine is not installed or nothing listens at its address."""
    if config.engine == "processes":
        return
    try:
        importlib.import_module(f"prefect_{config.engine}")
    except ImportError:
        raise InputError(
            f"engine {config.engine!r}: not installed: pip install r2id[{config.engine}]"
        ) from None
    if config.address is None or config.address == "auto":
        return
    parts = urlsplit(config.address if "://" in config.address else f"tcp://{config.address}")
    try:
        socket.create_connection(
            (parts.hostname or "", parts.port or 0), _SECONDS_TO_ANSWER
        ).close()
    except (OSError, ValueError) as error:
        raise InputError(
            f"address {config.address!r}: no {config.engine} cluster answers there: {error}"
        ) from None


def _with_or_without_prefect(plan: ShardPlan, numbers: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Write shards by tasks, and the rest without Prefect when its server fails."""
    done = set()
    try:
        for number, result in _by_tasks(plan, numbers):
            done.add(number)
            yield result
    except (InputError, WorkError, Stopped):
        raise
    except Exception as error:
        if not is_prefect_error(error):
            raise WorkError(
                f"{plan.config.engine}: {describe_error(error)}: "
                "run the same command again to continue"
            ) from error
        say(f"prefect: {describe_error(error)}; going on without it")
        yield from write_shards(plan, [number for number in numbers if number not in done])


def _by_tasks(plan: ShardPlan, numbers: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (shard number, result) of each task as it ends."""
    workers = min(plan.config.workers, len(numbers))
    if plan.config.engine == "processes" and workers == 1:
        yield from ((number, shard_task(plan, number)) for number in numbers)
        return
    with _runner(plan.config, workers) as runner:
        futures: dict[PrefectFuture[Any], int] = {
            runner.submit(shard_task, {"plan": plan, "number": number}): number
            for number in numbers
        }
        for future in as_completed(list(futures)):
            yield futures[future], future.result()


def _runner(config: PrepareConfig, workers: int) -> TaskRunner[Any]:
    if config.engine == "dask":
        from prefect_dask import DaskTaskRunner

        if config.address:
            return DaskTaskRunner(
                address=config.address, client_kwargs={"timeout": _SECONDS_TO_ANSWER}
            )
        return DaskTaskRunner(
            cluster_kwargs={
                "n_workers": workers,
                "threads_per_worker": 1,
                "dashboard_address": None,
            }
        )
    if config.engine == "ray":
        from prefect_ray import RayTaskRunner

        # Without an address, ray.init would take whatever cluster it finds on this machine.
        options = (
            {"address": config.address}
            if config.address
            else {"address": "local", "num_cpus": workers, "include_dashboard": False}
        )
        return RayTaskRunner(
            init_kwargs={**options, "log_to_driver": False, "logging_level": "ERROR"}
        )
    return ProcessPoolTaskRunner(max_workers=workers, initializer=exit_with_parent)


def _show(config: PrepareConfig, results: Sequence[dict[str, Any]]) -> None:
    """Show the table, some samples and the sizes of a finished set."""
    if not server_answers(within=_SECONDS_TO_RETURN):
        say("prefect: its server does not answer: no artifacts")
        return
    shown = overview(config.out, {result["file"]: result["rejects"] for result in results})
    try:
        create_table_artifact(shown.table, key="prepare-shards", description=shown.summary)
        for name, picture in (("samples", shown.samples), ("sizes", shown.sizes)):
            create_markdown_artifact(
                f"![{name}]({data_uri(_jpeg(picture), 'jpeg')})",
                key=f"prepare-{name}",
                description=shown.summary,
            )
    except Exception as error:
        say(f"prefect: no artifacts: {describe_error(error)}")


def _jpeg(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
