"""The whole pipeline as a Prefect flow: images → shards → RIAE → latents → R2ID → samples → report.

The pipeline's ``out`` folder holds riae/ and r2id/ (run directories), riae-finetuned/ where the
pipeline has that stage, latents/, samples/, report/ and pipeline.json (see pipelines/record.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow

from data_prep.overview import check_split, class_names
from pipelines.artifacts import show_pipeline
from pipelines.flows import encode_flow, evaluate_flow, sample_flow, train_flow
from pipelines.mlflow_run import MlflowRun
from pipelines.orchestration import prefect_ready
from pipelines.preparation import check_preparation, prepare_flow
from pipelines.processes import training_processes
from pipelines.record import Record
from r2id.config import (
    EvaluateConfig,
    PipelineRun,
    R2idRun,
    SampleConfig,
    SamplerConfig,
    build,
    change,
    find_labels,
    find_stages,
)
from r2id.errors import InputError, Stopped
from r2id.files import NOISE_SHIFT_FILE, exclusive, step_folders, step_of
from r2id.progress import duration, say


class PipelineExecution:
    """One run of the pipeline: its paths, its record and its MLflow run."""

    def __init__(self, config: PipelineRun, base: Path) -> None:
        self.config, self.out = config, config.out
        paths = config.stage_paths()
        self.riae, self.r2id = paths["riae"]["run"], paths["r2id"]["run"]
        self.codec, self.latents = paths["r2id"]["codec"], paths["r2id"]["data.latents"]
        self.samples, self.report = self.out / "samples", self.out / "report"
        self.page, self.metrics = self.report / "report.html", self.report / "metrics.json"
        self.headlines: list[str] = []
        self.pictures: list[Path] = []
        self.stages: list[dict[str, str]] = []
        self.times: dict[str, tuple[float, float]] = {}
        # All are read now, so that a misspelt option is reported before hours of work, not after.
        self.riae_stages = find_stages(config, base)
        self.r2id_stage = self.riae_stages.pop("r2id")
        self.sampling = build(SampleConfig, self._drawing("sample"))
        self.evaluation = build(EvaluateConfig, self._drawing("evaluate"))
        self._check_processes()
        self._check_riae_in_use()
        self.record = Record(self.out)
        self.mlflow = MlflowRun(config, self.record)

    def _check_riae_in_use(self) -> None:
        """Raise InputError when an RIAE would be trained under latents and an R2ID that use it."""
        users = [path for path in (self.latents, self.r2id / "checkpoints") if path.is_dir()]
        users = [path for path in users if any(path.iterdir())]
        for name, stage in self.riae_stages.items():
            steps, done = stage.run.train.steps, newest_step(stage.run.run)
            if not users or done >= steps:
                continue
            names = " and ".join(str(path) for path in (self.latents, self.r2id) if path.exists())
            raise InputError(
                f"{name}.train.steps = {steps}: {stage.run.run} is at step {done}, and training it "
                f"on would invalidate {names}, which were made with it as it is: remove them to "
                "make them anew afterwards, or choose another out"
                + (f", or keep {name}.train.steps={done}" if done else "")
            )

    def _check_processes(self) -> None:
        """Raise InputError when a stage's batch cannot be shared by the processes that train it."""
        for name, stage in {**self.riae_stages, "r2id": self.r2id_stage}.items():
            try:
                training_processes(stage.run.train)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None

    def _drawing(self, stage: str) -> dict[str, Any]:
        """Return the settings of "sample" or "evaluate": the R2ID config's [sample] and its own.

        Its own win. Raises InputError when they do not go together.
        """
        run = self.r2id_stage.run
        assert isinstance(run, R2idRun), "find_stages has checked it"
        own = getattr(self.config, stage).changes()
        known = {name: value for name, value in own.items() if name in SampleConfig.model_fields}
        if stage == "evaluate":  # it may be several scales, each checked by the section itself
            known.pop("guidance", None)
        try:
            sample = change(run.sample, known).model_dump()
            change(run, {"sample": sample})
        except InputError as error:
            raise InputError(f"{stage}: {error}") from None
        if run.r2id.condition == "none":  # then a model has no guidance, whatever its config says
            del sample["guidance"]
        shared = SampleConfig if stage == "sample" else SamplerConfig
        return {name: sample[name] for name in shared.model_fields if name in sample} | own

    def check_data(self) -> None:
        """Raise InputError when the shards lack what a later stage reads: splits, or classes.

        That is known only when they are prepared.
        """
        stages = {**self.riae_stages, "r2id": self.r2id_stage}
        for name, stage in stages.items():
            data = stage.run.data
            wanted = {f"{name}: data.train_split": data.train_split}
            if self.config.evaluate.split:  # previews, which show the test split, do without
                wanted["evaluate.split"] = self.config.evaluate.split
            else:
                wanted[f"{name}: data.test_split"] = data.test_split
            for setting, split in wanted.items():
                try:
                    check_split(self.config.prepare.out, split)
                except InputError as error:
                    raise InputError(f"{setting}: {error}") from None
            if isinstance(stage.run, R2idRun):
                self._check_labels(stage.run)

    def _check_labels(self, run: R2idRun) -> None:
        """Name the classes that samples are asked of, since numbers may be names of others.

        A command line does not tell them apart. Raises InputError for a class that there is not.
        """
        labels = self.sampling.labels
        names = class_names(self.config.prepare.out) if run.r2id.condition == "class" else []
        try:
            found = find_labels(labels, len(names), names)
        except InputError as error:
            raise InputError(f"sample.labels: {error}") from None
        if found:  # a copy, in which what was left to the run stays so
            named = tuple(names[number] for number in found)
            self.sampling = self.sampling.model_copy(update={"labels": named})

    def stage(self, name: str, work: Callable[[], Any]) -> Any:
        """Run a stage, print how long it took, and remember its times as Record.note takes them."""
        say(f"── {name}")
        start, began = time.time(), time.monotonic()
        result = work()
        seconds = time.monotonic() - began
        took = duration(seconds)
        say(f"── {name}: done in {took}")
        self.times[name] = start, start + seconds
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
        """Run a stage, or return its recorded result if what decides it is the same.

        That is its settings, the checkpoint and the noise shift applied to it. And its ``files``,
        and those that the result names, must still be there.
        """
        checkpoints = self.r2id / "checkpoints"
        latest = (
            checkpoints
            / (checkpoints / "latest").read_text(encoding="utf-8").strip()
            / "checkpoint.json"
        )
        shift = self.r2id / NOISE_SHIFT_FILE
        # checkpoint.json holds the hashes of the checkpoint's files, so it identifies the weights.
        key = hashlib.sha256(
            latest.read_bytes()
            + (shift.read_bytes() if shift.exists() else b"")
            + json.dumps(settings, sort_keys=True).encode()
        ).hexdigest()
        previous = self.record.find(name, key)
        if previous is not None:
            say(f"── {name}: up to date")
            outcome = _outcome(previous)
            self.stages.append({"stage": name, "time": "up to date", "result": outcome})
            return previous
        result = self.stage(name, work)
        note = {"params": settings, "times": self.times[name], "folder": folder}
        self.record.keep(name, key, result, files, note)
        return result


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
    PipelineExecution(config, base)  # reports mistakes in the configs before anything is started
    check_preparation(config.prepare)
    with exclusive(config.out), prefect_ready():
        return pipeline_flow(config, base)


@flow(name="pipeline", flow_run_name="{config.name}", validate_parameters=False)
def pipeline_flow(config: PipelineRun, base: Path) -> dict[str, Any]:
    """Run all stages in turn, each as a flow of its own, in one MLflow run; see run_pipeline."""
    pipeline = PipelineExecution(config, base)
    pipeline.mlflow.begin()
    status = "FAILED"
    try:
        result = _run_stages(pipeline)
        status = "FINISHED"
        return result
    except Stopped:
        status = "KILLED"
        raise
    finally:
        names = [picture.name for picture in pipeline.pictures]
        pipeline.mlflow.end(status, pipeline.headlines, names)


def _run_stages(pipeline: PipelineExecution) -> dict[str, Any]:
    config, shards = pipeline.config, pipeline.config.prepare.out
    environment = pipeline.mlflow.environment
    unprepared, settings = not (shards / "manifest.json").exists(), config.prepare
    if unprepared:  # before it is done, so that MLflow has it even if it is stopped
        pipeline.record.note("prepare", settings.model_dump(mode="json"), (time.time(), None))
    pipeline.stage("prepare", lambda: prepare_flow(settings))
    if unprepared:
        times = pipeline.times["prepare"]
        pipeline.record.note("prepare", settings.model_dump(mode="json"), times)
    pipeline.check_data()
    for name, stage in pipeline.riae_stages.items():
        pipeline.stage(
            "train riae" if name == "riae" else name,
            partial(train_flow, stage.file, stage.overrides, environment),
        )
    encoded = pipeline.stage(
        "encode",
        lambda: encode_flow(pipeline.codec, shards, pipeline.latents, config.encode, environment),
    )
    if encoded["reused"] < encoded["images"]:
        pipeline.record.note("encode", encoded, pipeline.times["encode"])
    r2id = pipeline.r2id_stage
    pipeline.stage("train r2id", lambda: train_flow(r2id.file, r2id.overrides, environment))
    samples = pipeline.once(
        "sample",
        pipeline.sampling.changes(mode="json"),
        pipeline.samples,
        lambda: sample_flow(pipeline.r2id, pipeline.samples, pipeline.sampling, environment),
    )
    evaluation = pipeline.once(
        "evaluate",
        pipeline.evaluation.changes(mode="json"),
        pipeline.report,
        lambda: evaluate_flow(
            pipeline.r2id, shards, pipeline.report, pipeline.evaluation, environment
        ),
        (pipeline.page, pipeline.metrics),
    )
    pipeline.headlines = list(evaluation["headlines"])
    pipeline.pictures = [Path(file) for file in samples["files"]]
    summary = _summary(pipeline)
    show_pipeline(config.name, pipeline.stages, summary["lines"], pipeline.pictures)
    return summary


def _summary(pipeline: PipelineExecution) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "name": pipeline.config.name,
        "out": str(pipeline.out),
        "shards": str(pipeline.config.prepare.out),
        "riae": str(pipeline.codec),
        "r2id": str(pipeline.r2id),
        "pictures": [str(picture) for picture in pipeline.pictures],
        "report": str(pipeline.page),
        "metrics": str(pipeline.metrics),
        "headlines": pipeline.headlines,
        "mlflow": pipeline.mlflow.how_to_open(),
    }
    lines = [
        *summary["headlines"],
        *(f"picture: {path}" for path in summary["pictures"]),
        f"report: {summary['report']}",
    ]
    if summary["mlflow"]:
        lines.append(f"MLflow: {summary['mlflow']}")
    return {**summary, "lines": lines}
