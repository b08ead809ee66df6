"""The MLflow run of a pipeline; the runs of its stages are child runs of it.

``python -m r2id.training.tracking.pipeline begin|end`` reads a request as JSON from stdin and
prints the ids of the run and its experiment. A pipeline runs it in a process of its own, because
pipelines import no mlflow. Its training stages find the run's id in the environment variable
R2ID_PARENT_RUN.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from r2id.mlflow_pages import run_page
from r2id.progress import say
from r2id.training.tracking.facts import flatten, git_tags
from r2id.training.tracking.store import RunOpening, answers, connect, first_line, refuses

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_MAX_METRICS_PER_BATCH = 1000  # limit of MLflow's own stores
# How long a store that is busy is asked again; after SIGTERM, a scheduler does not wait for long.
_SECONDS, _SECONDS_WHEN_KILLED = 15.0, 4.0
_Made = TypeVar("_Made")
# Pages of a pipeline's run, and the parts of their addresses.
_PAGES = {
    "Report": "artifacts/report/report.html",
    "Charts": "model-metrics",
    "Samples": "artifacts/samples",
    "Samples while training": "artifacts/r2id/film.png",
    "Reconstructions while training": "artifacts/riae/reconstructions",
}
# The main results among the metrics of an evaluation.
_OF_SIZE = re.compile(r"r2id\.sizes\.(?P<size>[^.]+)\.(?P<name>accuracy|frechet|precision|recall)")
_OF_RIAE = re.compile(r"riae\.(?P<size>native|half|double)\.(?P<name>psnr)")


def begin_pipeline(request: Mapping[str, Any]) -> dict[str, str]:
    """Begin the run of a pipeline, or continue ``request["run"]`` → the ids of run and experiment.

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
    opened = _persist(lambda: opening.open(connect()), _SECONDS)
    return {"run": opened.run_id, "experiment": opened.experiment_id}


def end_pipeline(request: Mapping[str, Any]) -> dict[str, str]:
    """End the run of a pipeline, and record the stages that do not record themselves.

    ``request`` has run, status, stages, headlines (lines of text) and pictures (names of files in
    samples/). Each stage has name, params, times, metrics and artifacts (paths), and becomes a
    child run. Its times are its start and end in seconds since 1970, or None if they are unknown; a
    stage without an end was not finished, and has the pipeline's status. The pipeline's own run
    gets its files too, its main results, and a description with headlines and pictures.
    """
    seconds = _SECONDS_WHEN_KILLED if request["status"] == "KILLED" else _SECONDS
    return _persist(lambda: _end(request), seconds)


def _persist(act: Callable[[], _Made], seconds: float) -> _Made:
    """Return what ``act`` returns, trying again for some seconds while the store is busy."""
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except Exception as error:
            if refuses(error) or time.monotonic() > end:
                raise
            time.sleep(1.0)


def _end(request: Mapping[str, Any]) -> dict[str, str]:
    client = connect()
    parent = client.get_run(request["run"])
    for stage in request["stages"]:
        child = _open_child(client, parent, stage)
        numbers = _numbers(stage["metrics"])
        _log_numbers(client, child, {name.replace(".", "/"): n for name, n in numbers.items()})
        _log_numbers(client, parent.info.run_id, _main_results(numbers))
        try:
            for path in map(Path, stage["artifacts"]):
                _log_files(client, child, path, "")
                _log_files(client, parent.info.run_id, path, path.name)
        except Exception as error:
            if not answers(client, child):
                raise
            say(f"tracking: files of {stage['name']} are left out: {first_line(error)}")
        now = time.time()
        _, end = stage["times"] or (None, now)
        client.set_terminated(
            child, "FINISHED" if end else request["status"], _milliseconds(end or now)
        )
    if request["stages"] and request["headlines"]:
        note = _description(client, parent, request["headlines"], request["pictures"])
        client.set_tag(parent.info.run_id, "mlflow.note.content", note)
    client.set_terminated(parent.info.run_id, request["status"])
    return {"run": parent.info.run_id, "experiment": parent.info.experiment_id}


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
        start_time=_milliseconds(stage["times"][0]) if stage["times"] else None,
    )
    return opening.open(client).run_id


def _milliseconds(seconds: float) -> int:
    return int(seconds * 1000)


def _numbers(table: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a nested table, under names that MLflow allows."""
    numbers = {}
    for key, text in flatten(table).items():
        with contextlib.suppress(ValueError):  # raised by text that is no number
            numbers[re.sub(r"[^\w./ -]", "_", key)] = float(text)
    return numbers


def _main_results(numbers: Mapping[str, float]) -> dict[str, float]:
    """Pick the results that a pipeline's own run shows, such as ``results/accuracy 8x8``."""
    found = {}
    for key, value in numbers.items():
        of_size, of_riae = (pattern.fullmatch(key) for pattern in (_OF_SIZE, _OF_RIAE))
        if of_size:
            found[f"results/{of_size['name']} {of_size['size']}"] = value
        elif of_riae:
            found[f"results/RIAE {of_riae['name']} {of_riae['size']}"] = value
    return found


def _log_numbers(client: MlflowClient, run_id: str, numbers: Mapping[str, float]) -> None:
    from mlflow.entities import Metric

    now = _milliseconds(time.time())
    metrics = [Metric(key, value, now, 0) for key, value in numbers.items()]
    client.log_batch(run_id, metrics=metrics[:_MAX_METRICS_PER_BATCH])


def _log_files(client: MlflowClient, run_id: str, path: Path, folder: str) -> None:
    """Record a file, or those of a folder, without weights: nobody looks at them in MLflow."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix != ".safetensors":
            inner = file.parent.relative_to(path) if path.is_dir() else Path()
            place = (Path(folder) / inner).as_posix()
            client.log_artifact(run_id, str(file), None if place == "." else place)


def _description(
    client: MlflowClient, parent: Run, headlines: Sequence[str], pictures: Sequence[str]
) -> str:
    """Write what the page of a pipeline's run says first, as Markdown.

    Links come first, because MLflow folds all but the first lines away.
    """
    run, experiment = parent.info.run_id, parent.info.experiment_id
    recorded: set[str] = set()
    try:
        for folder in (None, "report", "r2id", "riae"):
            recorded |= {file.path for file in client.list_artifacts(run, folder)}
    except Exception:  # their place is known to a server alone
        if not answers(client, run):
            raise
    links = [
        f"[{name}]({run_page(experiment, run, tab, '')})"
        for name, tab in _PAGES.items()
        if tab.removeprefix("artifacts/") in {*recorded, "model-metrics"}
    ]
    shown = [
        f"{Path(name).stem}:\n\n![{name}](get-artifact?path=samples/{name}&run_uuid={run})"
        for name in pictures
    ]
    lines = "\n".join(f"* {line}" for line in headlines)
    return "\n\n".join([" · ".join(links), lines, *shown])


def main() -> int:
    """Carry out the request on stdin; return the exit code: 0, or 1 when MLflow fails."""
    try:
        act = {"begin": begin_pipeline, "end": end_pipeline}[sys.argv[1]]
        print(json.dumps(act(json.load(sys.stdin))))
        return 0
    except Exception as error:  # the pipeline goes on without tracking
        say(f"tracking: {first_line(error)}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
