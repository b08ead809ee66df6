"""The whole pipeline as a Prefect flow: images → shards → RIAE → latents → R2ID → samples → report.

The pipeline's ``out`` folder holds riae/ and r2id/ (run directories), riae-finetuned/ where the
pipeline has that stage, latents/, samples/, report/ and pipeline.json, which records the MLflow run
and what the samples and report were made from.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow

from data_prep.overview import check_split, class_names
from pipelines.artifacts import show_mlflow_run, show_pipeline
from pipelines.flows import encode_flow, evaluate_flow, sample_flow, train_flow
from pipelines.orchestration import prefect_ready
from pipelines.preparation import check_preparation, prepare_flow
from r2id.config import (
    PipelineRun,
    R2idRun,
    RiaeRun,
    SampleConfig,
    StageConfig,
    change,
    find_labels,
    load_config,
    override,
)
from r2id.errors import InputError, Stopped
from r2id.files import exclusive, step_folders, step_of, write_atomic
from r2id.mlflow_pages import how_to_open, run_page, server_command
from r2id.progress import duration, say


class Pipeline:
    """One run of the pipeline: its paths, its record and its MLflow run."""

    def __init__(self, config: PipelineRun, base: Path) -> None:
        self.config, self.base, self.out = config, base, config.out
        self.riae, self.r2id, self.latents = (
            self.out / "riae",
            self.out / "r2id",
            self.out / "latents",
        )
        # The RIAE that latents are made with, which is the first one where there is no second.
        self.codec = self.out / "riae-finetuned" if config.finetune else self.riae
        self.samples, self.report = self.out / "samples", self.out / "report"
        self.page, self.metrics = self.report / "report.html", self.report / "metrics.json"
        self.record_file = self.out / "pipeline.json"
        self.executed: list[dict[str, Any]] = []
        self.headlines: list[str] = []
        self.stages: list[dict[str, str]] = []
        self.environment: dict[str, str] = {}
        # All are read now, so that a misspelt option is reported before hours of work, not after.
        self.riae_stages = {"riae": self._stage("riae", "riae", config.riae, {"run": self.riae})}
        if config.finetune:
            self.riae_stages["finetune"] = self._stage(
                "finetune", "riae", config.finetune, {"run": self.codec, "init_from": self.riae}
            )
        self.r2id_stage = self._stage(
            "r2id",
            "r2id",
            config.r2id,
            {"run": self.r2id, "codec": self.codec, "data.latents": self.latents},
        )
        self._check_riae_in_use()
        self.record = self._read_record()

    def _check_riae_in_use(self) -> None:
        """Raise InputError when an RIAE would be trained under latents and an R2ID that use it."""
        users = [path for path in (self.latents, self.r2id / "checkpoints") if path.is_dir()]
        users = [path for path in users if any(path.iterdir())]
        for name, stage in self.riae_stages.items():
            riae = load_config(*stage)
            assert isinstance(riae, RiaeRun)
            steps, done = riae.train.steps, newest_step(riae.run)
            if not users or done >= steps:
                continue
            names = " and ".join(str(path) for path in (self.latents, self.r2id) if path.exists())
            raise InputError(
                f"{name}.train.steps = {steps}: {riae.run} is at step {done}, and training it on "
                f"would invalidate {names}, which were made with it as it is: remove them to make "
                "them anew afterwards, or choose another out"
                + (f", or keep {name}.train.steps={done}" if done else "")
            )

    def _stage(
        self, name: str, kind: str, stage: StageConfig, paths: Mapping[str, Path]
    ) -> tuple[Path, tuple[str, ...]]:
        """Return a stage's config file and overrides; those of the pipeline come last and win."""
        file = self.base / stage.config
        tracking = self.config.tracking.changes()
        tracking.pop("name", None)  # names the pipeline's run; a stage's run keeps its own name
        values = {
            **paths,
            "data.shards": self.config.prepare.out,
            **{f"tracking.{name}": value for name, value in tracking.items()},
        }
        overrides = (*stage.set, *(override(key, value) for key, value in values.items()))
        run = load_config(file, overrides)
        if run.stage != kind:
            raise InputError(f"{name}.config: {file} is of stage {run.stage!r}, must be {kind!r}")
        if isinstance(run, R2idRun):
            self._check_sampling(run)
        return file, overrides

    def _check_sampling(self, run: R2idRun) -> None:
        """Raise InputError when the pipeline's settings do not fit the R2ID run's own settings."""
        for name in ("sample", "evaluate"):
            changes = getattr(self.config, name).changes()
            if name == "evaluate":  # it may be several scales, each checked by the section itself
                changes.pop("guidance", None)
            known = {k: v for k, v in changes.items() if k in SampleConfig.model_fields}
            try:
                change(run, {"sample": run.sample.model_dump() | known})
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    def check_data(self) -> None:
        """Raise InputError when the shards lack what a later stage reads: splits, or classes.

        That is known only when they are prepared.
        """
        stages = {**self.riae_stages, "r2id": self.r2id_stage}
        for name, (file, overrides) in stages.items():
            run = load_config(file, overrides)
            assert not isinstance(run, PipelineRun), "_stage has checked it"
            data = run.data
            for setting in ("train_split", "test_split"):
                try:
                    check_split(self.config.prepare.out, getattr(data, setting))
                except InputError as error:
                    raise InputError(f"{name}: data.{setting}: {error}") from None
            if isinstance(run, R2idRun):
                self._check_labels(run)

    def _check_labels(self, run: R2idRun) -> None:
        """Raise InputError when samples are asked of a class that there is not."""
        labels = self.config.sample.labels or run.sample.labels
        names = class_names(self.config.prepare.out) if run.r2id.condition == "class" else []
        try:
            find_labels(labels, len(names), names)
        except InputError as error:
            raise InputError(f"sample.labels: {error}") from None

    def _read_record(self) -> dict[str, Any]:
        if not self.record_file.exists():
            return {"mlflow_run": None, "stages": {}}
        try:
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.record_file}: damaged ({error}); remove it to begin a new record"
            ) from None

    def write_record(self) -> None:
        write_atomic(self.record_file, json.dumps(self.record, indent=2).encode())

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage and print how long it took."""
        say(f"── {name}")
        began = time.monotonic()
        result = work()
        took = duration(time.monotonic() - began)
        say(f"── {name}: done in {took}")
        self.stages.append({"stage": name, "time": took, "result": _outcome(result)})
        return result

    def once(
        self,
        name: str,
        settings: Mapping[str, Any],
        folder: Path,
        work: Callable[[], Any],
        files: Sequence[Path] = (),
    ) -> Any:
        """Run a stage, or return its recorded result if settings and checkpoint are the same.

        Then its ``files``, and those that the result names, must still be there, too.
        """
        checkpoints = self.r2id / "checkpoints"
        latest = (
            checkpoints
            / (checkpoints / "latest").read_text(encoding="utf-8").strip()
            / "checkpoint.json"
        )
        # checkpoint.json holds the hashes of the checkpoint's files, so it identifies the weights.
        key = hashlib.sha256(
            latest.read_bytes() + json.dumps(settings, sort_keys=True).encode()
        ).hexdigest()
        previous = self.record["stages"].get(name)
        made = [*map(Path, previous["result"].get("files", ())), *files] if previous else []
        if previous and previous["key"] == key and all(path.is_file() for path in made):
            say(f"── {name}: up to date")
            outcome = _outcome(previous["result"])
            self.stages.append({"stage": name, "time": "up to date", "result": outcome})
            return previous["result"]
        result = self.stage(name, work)
        self.record["stages"][name] = {"key": key, "result": result}
        self.write_record()
        metrics = _read_json(self.metrics) if name == "evaluate" else {}
        self.note(name, settings, [folder], metrics)
        return result

    def note(
        self,
        name: str,
        params: Mapping[str, Any],
        artifacts: Sequence[Path] = (),
        metrics: Mapping[str, Any] | None = None,
    ) -> None:
        """Remember a stage that does not log to MLflow itself; end_tracking writes a run for it."""
        self.executed.append(
            {
                "name": name,
                "params": params,
                "artifacts": [str(path) for path in artifacts],
                "metrics": metrics or {},
            }
        )

    def begin_tracking(self) -> None:
        """Open the MLflow run that becomes the parent of the stages' runs, if tracking is on."""
        tracking = self.config.tracking
        if tracking.enabled:
            begun = _tracking(
                "begin",
                {
                    "experiment": tracking.experiment,
                    "name": tracking.name or self.config.name,
                    "run": self.record["mlflow_run"],
                    "params": self.config.model_dump(mode="json"),
                },
            )
            if begun:
                self.environment["R2ID_PARENT_RUN"] = self.record["mlflow_run"] = begun["run"]
                self.record["mlflow_experiment"] = begun["experiment"]
                self.write_record()
                say(f"MLflow: {self.how_to_open_mlflow()}")
                show_mlflow_run(run_page(begun["experiment"], begun["run"]), server_command())

    def how_to_open_mlflow(self) -> str | None:
        """Return one line that leads to the pipeline's MLflow run; None when it has none."""
        run = self.record["mlflow_run"]
        if not self.config.tracking.enabled or not run:
            return None
        return how_to_open(self.record.get("mlflow_experiment"), run)

    def end_tracking(self, status: str) -> None:
        """Close the MLflow run with a status, and add the noted stages as its children."""
        if self.environment:
            request = {
                "run": self.record["mlflow_run"],
                "status": status,
                "stages": self.executed,
                "headlines": self.headlines,
            }
            _tracking("end", request)


def _outcome(result: Any) -> str:
    """Say in a few words what a stage has made."""
    if not isinstance(result, Mapping):  # prepare returns its folder
        return str(result)
    if result.get("headlines"):
        return str(result["headlines"][0])  # all are in the results
    if "files" in result:
        return f"{len(result['files'])} pictures"
    shown = ("step", "loss", "images_per_second", "checkpoint", "images", "reused", "out")
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name in shown
        if (value := result.get(name)) is not None
    )


def newest_step(run: Path) -> int:
    """Return the step of a run's newest checkpoint, 0 without one."""
    folders = step_folders(run / "checkpoints", "checkpoint.json")
    return max(map(step_of, folders), default=0)


def run_pipeline(config: PipelineRun, base: Path = Path()) -> dict[str, Any]:
    """Run everything that is not done yet.

    ``base`` is the folder that the stages' config files are relative to. Returns paths and figures,
    and under ``lines`` a summary for people. Raises InputError, WorkError and Stopped, as stages
    do.
    """
    Pipeline(config, base)  # reports mistakes in the configs before anything is started
    check_preparation(config.prepare)
    with exclusive(config.out), prefect_ready():
        return pipeline_flow(config, base)


@flow(name="pipeline", flow_run_name="{config.name}", validate_parameters=False)
def pipeline_flow(config: PipelineRun, base: Path) -> dict[str, Any]:
    """Run all stages in turn, each as a flow of its own, in one MLflow run; see run_pipeline."""
    pipeline = Pipeline(config, base)
    pipeline.begin_tracking()
    status = "FAILED"
    try:
        result = _run_stages(pipeline)
        status = "FINISHED"
        return result
    except Stopped:
        status = "KILLED"
        raise
    finally:
        pipeline.end_tracking(status)


def _run_stages(pipeline: Pipeline) -> dict[str, Any]:
    config, shards, environment = pipeline.config, pipeline.config.prepare.out, pipeline.environment
    if not (shards / "manifest.json").exists():
        pipeline.note("prepare", config.prepare.model_dump(mode="json"))
    pipeline.stage("prepare", lambda: prepare_flow(config.prepare))
    pipeline.check_data()
    for name, stage in pipeline.riae_stages.items():
        pipeline.stage(
            "train riae" if name == "riae" else name, partial(train_flow, *stage, environment)
        )
    encoded = pipeline.stage(
        "encode",
        lambda: encode_flow(pipeline.codec, shards, pipeline.latents, config.encode, environment),
    )
    if encoded["reused"] < encoded["images"]:
        pipeline.note("encode", encoded)
    pipeline.stage("train r2id", lambda: train_flow(*pipeline.r2id_stage, environment))
    samples = pipeline.once(
        "sample",
        config.sample.changes(mode="json"),
        pipeline.samples,
        lambda: sample_flow(pipeline.r2id, pipeline.samples, config.sample, environment),
    )
    evaluation = pipeline.once(
        "evaluate",
        config.evaluate.changes(mode="json"),
        pipeline.report,
        lambda: evaluate_flow(pipeline.r2id, shards, pipeline.report, config.evaluate, environment),
        (pipeline.page, pipeline.metrics),
    )
    pipeline.headlines = list(evaluation["headlines"])
    summary = _summary(pipeline, samples)
    pictures = [Path(file) for file in summary["pictures"]]
    show_pipeline(config.name, pipeline.stages, summary["lines"], pictures)
    return summary


def _summary(pipeline: Pipeline, samples: Mapping[str, Any]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "name": pipeline.config.name,
        "out": str(pipeline.out),
        "shards": str(pipeline.config.prepare.out),
        "riae": str(pipeline.codec),
        "r2id": str(pipeline.r2id),
        "pictures": [str(f) for f in samples["files"]],
        "report": str(pipeline.page),
        "metrics": str(pipeline.metrics),
        "headlines": pipeline.headlines,
        "mlflow": pipeline.how_to_open_mlflow(),
    }
    lines = [
        *summary["headlines"],
        *(f"picture: {path}" for path in summary["pictures"]),
        f"report: {summary['report']}",
    ]
    if summary["mlflow"]:
        lines.append(f"MLflow: {summary['mlflow']}")
    return {**summary, "lines": lines}


def _tracking(verb: str, request: Mapping[str, Any]) -> dict[str, str] | None:
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


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
