"""Every setting of a pipeline arrives at its stage; what it leaves out is the stage's own.

The flows run as they are, without Prefect's server. The commands that they would start are recorded
and given to the real command line, whose library functions are recorders too: what these are called
with is what has arrived.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipelines import flows, mlflow_run, pipeline, preparation, subprocesses
from r2id.cli.options import app
from r2id.config import (
    EncodeConfig,
    EvaluateConfig,
    PipelineRun,
    PrepareConfig,
    R2idRun,
    RiaeRun,
    SampleConfig,
    Section,
    TrackingConfig,
    load_config,
    losses,
    models,
    override,
)
from r2id.errors import InputError

STAGES: dict[str, type[Section]] = {
    "prepare": PrepareConfig,
    "riae": RiaeRun,
    "encode": EncodeConfig,
    "r2id": R2idRun,
    "sample": SampleConfig,
    "evaluate": EvaluateConfig,
    "tracking": TrackingConfig,
}
THE_PIPELINES = {"stage", "run", "codec", "data.shards", "data.latents"}
"""Settings of training runs that a pipeline decides itself."""
REFUSED = {"r2id.data.window", "r2id.data.stream", "riae.train.guide_after"}
"""Settings that a stage cannot have: R2ID is trained on cached latents, an RIAE has no guide."""
ALONE: dict[str, list[str]] = {
    "prepare.address": ["prepare.engine=dask"],
    "prepare.labels": ["prepare.dataset=folder"],
    "sample.autoguidance": ["r2id.train.guide_after=0.5"],
    "evaluate.autoguidance": ["r2id.train.guide_after=0.5"],
    "riae.data.window": [],
    "riae.loss.freeze_encoder": ["riae.init_from=other"],
    "riae.riae.kind": [],
    "riae.riae.downsample": ["riae.riae.kind=attention"],
    **{
        f"riae.{section}.{name}": ["riae.riae.kind=attention"]
        for section, names in {"riae": models._ATTENTION, "loss": losses._ATTENTION}.items()
        for name in names
    },
    "riae.engine.offload": [],
    "r2id.engine.offload": [],
    "r2id.r2id.levels": ["r2id.r2id.width=16", "r2id.r2id.heads=1"],
    "r2id.sample.eta": ["r2id.sample.solver=ddim"],
    "sample.eta": ["sample.solver=ddim"],
    "evaluate.eta": ["evaluate.solver=ddim"],
}
"""Settings that do not go with the other values of others, and what has to be set beside them."""

RIAE = """
stage = "riae"
run = "elsewhere"
[data]
shards = "elsewhere"
[train]
steps = 40
[tracking]
experiment = "the stage's own"
"""
R2ID = """
stage = "r2id"
run = "elsewhere"
codec = "elsewhere"
[data]
shards = "elsewhere"
[train]
steps = 40
[sample]
solver = "heun"
guidance = 1.5
"""
PIPELINE = """
stage = "pipeline"
name = "tiny"
out = "{out}"
[prepare]
dataset = "digits"
out = "data/digits"
[riae]
config = "riae.toml"
[r2id]
config = "r2id.toml"
"""

OWN = {"r2id.sample.solver": "heun"}
"""What these files set to another value than its default."""
Arrived = dict[str, Any]
"""Stage → what it was started with: its config, or the arguments of its function."""


def candidates(annotation: Any) -> Iterator[Any]:
    """Some values of a type, whatever its limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    plain = {
        bool: (True, False),
        int: (1, 2, 3, 16),
        float: (0.05, 0.2, 0.5, 2.5),
        str: ("other", "-other words"),
        Path: (Path("some where"), Path("other")),
    }
    if annotation in plain:
        yield from plain[annotation]
    elif origin is Literal:
        yield from arguments
    elif origin is Annotated:
        yield from candidates(arguments[0])
    elif origin is dict:
        yield {"other": 1}
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        fields = annotation.model_fields.items()
        values = {name: list(candidates(field.annotation))[-1] for name, field in fields}
        yield from (annotation(**values), annotation(**values))
    elif origin is tuple and arguments[-1] is Ellipsis:
        yield from ((one, two) for one, two in zip(*[candidates(arguments[0])] * 2, strict=False))
    elif origin is tuple:  # its parts differ, and rise
        choices = [list(candidates(part)) for part in arguments]
        yield tuple(part[min(place, len(part) - 1)] for place, part in enumerate(choices))
        yield tuple(part[-1] for part in choices)
    else:
        assert arguments, f"{annotation}: a type without candidates"
        for part in arguments:
            if part is not type(None):
                yield from candidates(part)


def other_value(name: str, field: FieldInfo) -> Any:
    """A value that the field may have and does not have by default."""
    allowed = TypeAdapter(
        Annotated[(field.annotation, None, *field.metadata)],  # type: ignore[arg-type]
        config={"strict": True},
    )
    for value in candidates(field.annotation):
        with contextlib.suppress(ValidationError):
            if allowed.validate_python(value) not in (field.default, OWN.get(name)):
                return value
    raise AssertionError(f"{name}: no other value found")


def settings(schema: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """The names of all fields of a section and of those within it, with dots."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from settings(field.annotation, f"{prefix}{name}.")
        elif prefix + name not in THE_PIPELINES and not is_fixed(field):
            yield prefix + name, field


def is_fixed(field: FieldInfo) -> bool:
    """Whether the field has one value only, as one that says what kind a section is of."""
    return get_origin(field.annotation) is Literal and len(get_args(field.annotation)) == 1


Run = Callable[..., Arrived]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a pipeline with overrides as far as its stages' functions."""
    out = tmp_path / "out"
    for name, text in {"riae": RIAE, "r2id": R2ID, "pipeline": PIPELINE}.items():
        (tmp_path / f"{name}.toml").write_text(text.format(out=out))
    # What both trainings, RIAE's a long one, and the evaluation would have left.
    for file, text in {
        "riae/checkpoints/step-99999999/checkpoint.json": "{}",
        "r2id/checkpoints/latest": "step",
        "report/metrics.json": "{}",
    }.items():
        (out / file).parent.mkdir(parents=True)
        (out / file).write_text(text)
    (out / "r2id/checkpoints/step").mkdir()
    (out / "r2id/checkpoints/step/checkpoint.json").write_text("{}")

    commands: list[list[str]] = []
    arrived: Arrived = {}
    for name in ("encode_flow", "sample_flow", "evaluate_flow", "train_flow", "prepare_flow"):
        monkeypatch.setattr(pipeline, name, getattr(pipeline, name).fn)
    for name in ("run_stage_task", "train_task"):
        monkeypatch.setattr(flows, name, getattr(flows, name).fn)
    shown = SimpleNamespace(environment={}, result={})
    monkeypatch.setattr(flows, "TrainingArtifacts", lambda *_: contextlib.nullcontext(shown))
    monkeypatch.setattr(pipeline, "show_pipeline", lambda *_: None)
    monkeypatch.setattr(mlflow_run, "_ask", lambda verb, order: arrived.update({verb: order}))

    def prepare(config: PrepareConfig, _write_all: object) -> None:
        arrived["prepare"] = config

    def run_command(command: list[str], _environment: object) -> tuple[int, str, str]:
        commands.append(command)
        result = {"files": [], "headlines": [], "images": 1, "reused": 1}
        return 0, json.dumps(result), ""

    monkeypatch.setattr(preparation, "prepare", prepare)
    for check in ("check_data", "_check_riae_in_use"):  # there are no shards and no RIAE
        monkeypatch.setattr(pipeline.PipelineExecution, check, lambda _: None)
    monkeypatch.setattr(subprocesses, "run_command", run_command)
    record_stages(monkeypatch, arrived)

    def run(*overrides: str) -> Arrived:
        commands.clear()
        arrived.clear()
        (out / "pipeline.json").unlink(missing_ok=True)
        config = load_config(tmp_path / "pipeline.toml", overrides)
        assert isinstance(config, PipelineRun)
        pipeline.pipeline_flow.fn(config, tmp_path)
        for command in commands:
            app(command[command.index("r2id.cli") + 1 :], standalone_mode=False)
        capsys.readouterr()
        return dict(arrived)

    return run


def record_stages(monkeypatch: pytest.MonkeyPatch, arrived: Arrived) -> None:
    """Put recorders in the place of the functions that the commands call."""
    import r2id.evaluation.run
    import r2id.sampling.grids
    import r2id.training.encode
    import r2id.training.loop

    def record(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(function)

        def recorder(*arguments: Any, **named: Any) -> dict[str, Any]:
            bound = signature.bind(*arguments, **named).arguments
            arrived[name] = {**bound, **bound.pop("settings", {})}
            return {"out": "", "images": 1, "reused": 1, "files": [], "headlines": []}

        return recorder

    def train(config: RiaeRun | R2idRun, **_: object) -> dict[str, Any]:
        arrived[config.stage] = config
        return {"checkpoint": "", "step": 0}

    monkeypatch.setattr(r2id.training.loop, "train", train)
    for module, function, stage in (
        (r2id.training.encode, "encode", "encode"),
        (r2id.sampling.grids, "draw_grids", "sample"),
        (r2id.evaluation.run, "evaluate", "evaluate"),
    ):
        monkeypatch.setattr(module, function, record(stage, getattr(module, function)))


def value_at(arrived: Any, name: str) -> Any:
    for part in name.split("."):
        arrived = arrived[part] if isinstance(arrived, dict) else getattr(arrived, part)
    return arrived


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "tracking"])
def test_every_setting_arrives(stage: str, run: Run) -> None:
    others = {
        f"{stage}.{name}": other_value(f"{stage}.{name}", field)
        for name, field in settings(STAGES[stage])
    } | ({"prepare.dataset": "celeba"} if stage == "prepare" else {})
    together = {name: value for name, value in others.items() if name not in {*ALONE, *REFUSED}}
    check_arrival(stage, together, run(*(override(*item) for item in together.items()))[stage])
    for name in others.keys() & ALONE.keys():
        alone = run(override(name, others[name]), *ALONE[name])[stage]
        check_arrival(stage, {name: others[name]}, alone)
    for name in others.keys() & REFUSED:
        with pytest.raises(InputError, match=name.rpartition(".")[2]):
            run(override(name, others[name]))


def check_arrival(stage: str, expected: dict[str, Any], arrived: Any) -> None:
    if stage == "evaluate" and expected.pop("evaluate.invariance", False):
        # The function has one argument for two settings: how many samples it is measured on.
        expected["evaluate.invariance"] = expected.pop("evaluate.invariance_count")
    if (
        "sample.labels" in expected
    ):  # names and numbers of classes alike are texts on a command line
        expected["sample.labels"] = tuple(map(str, expected["sample.labels"]))
    found = {name: value_at(arrived, name.partition(".")[2]) for name in expected}
    assert found == expected


def test_tracking_arrives_at_every_stage_and_at_the_pipelines_own_run(run: Run) -> None:
    for name, field in settings(TrackingConfig):
        value = other_value(f"tracking.{name}", field)
        arrived = run(override(f"tracking.{name}", value))
        if name == "enabled":
            assert "begin" not in arrived
        else:
            assert arrived["begin"][name] == value
        for stage in ("riae", "r2id"):
            own = getattr(arrived[stage].tracking, name)
            assert own is None if name == "name" else own == value


def test_a_finetuned_riae_takes_the_place_of_the_first(run: Run, tmp_path: Path) -> None:
    (tmp_path / "finetune.toml").write_text(RIAE)
    out = tmp_path / "out"
    first, last = run(), run("finetune.config=finetune.toml", "finetune.loss.freeze_encoder=true")
    assert first["riae"].run == out / "riae" and first["riae"].init_from is None
    assert last["riae"].run == out / "riae-finetuned" and last["riae"].init_from == out / "riae"
    assert last["riae"].loss.freeze_encoder
    for arrived, codec in ((first, out / "riae"), (last, out / "riae-finetuned")):
        assert arrived["encode"]["riae"] == arrived["r2id"].codec == codec
    with pytest.raises(InputError, match=r"finetune\.config: .*must be 'riae'"):
        run("finetune.config=r2id.toml")


def test_numbers_of_classes_become_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the command line that draws them, a number could be the name of another class."""
    monkeypatch.setattr(pipeline, "class_names", lambda _: ["1", "10", "2"])
    given: Any = SimpleNamespace(config=SimpleNamespace(prepare=SimpleNamespace(out=None)))
    given.sampling = SampleConfig(labels=(2, "2", "0"))
    of_classes: Any = SimpleNamespace(r2id=SimpleNamespace(condition="class"))
    pipeline.PipelineExecution._check_labels(given, of_classes)
    assert given.sampling.changes() == {"labels": ("2", "2", "1")}


def test_what_a_pipeline_does_not_set_is_the_stages_own(run: Run) -> None:
    """As its config says now: what it said when R2ID was trained is in the checkpoint."""
    arrived = run("r2id.sample.count=7")
    own = arrived["r2id"].sample.model_dump()
    assert (own["solver"], own["guidance"], own["count"]) == ("heun", 1.5, 7)
    empty = {"sizes": (), "labels": ()}
    given = {name: value for name, value in arrived["sample"].items() if name in own}
    assert empty | given == own
    assert arrived["evaluate"]["guidance"] == (1.5,) and arrived["evaluate"]["count"] == 1000
    for name in ("steps", "autoguidance", "guidance_interval", "eta", "solver"):
        assert arrived["evaluate"][name] == own[name]
    assert arrived["riae"].tracking.experiment == "the stage's own"
    assert arrived["riae"].data.shards == arrived["r2id"].data.shards == Path("data/digits")


def test_the_default_guidance_is_not_asked_of_a_model_without_conditions(run: Run) -> None:
    arrived = run("r2id.r2id.condition=none")
    assert "guidance" not in arrived["sample"] and arrived["evaluate"].get("guidance") is None


def test_pictures_are_drawn_anew_when_the_stages_own_settings_change(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run()["sample"]["overwrite"], "the pictures of before are replaced"
    for changes, said in (((), "up to date"), (("r2id.sample.steps=7",), "done")):
        config = load_config(tmp_path / "pipeline.toml", changes)
        assert isinstance(config, PipelineRun)
        pipeline.pipeline_flow.fn(config, tmp_path)
        assert f"── sample: {said}" in capsys.readouterr().err


def test_settings_that_do_not_go_with_the_stages_own_are_told_before_anything_starts(
    run: Run,
) -> None:
    for table in ("sample", "evaluate"):
        with pytest.raises(InputError, match=rf"{table}.*eta = 0\.5.*heun"):
            run(f"{table}.eta=0.5")
        assert run(f"{table}.eta=0.5", f"{table}.solver=ddim")[table]["eta"] == 0.5
        with pytest.raises(InputError, match=rf"{table}.*autoguidance = 1\.5.*train\.guide_after"):
            run(f"{table}.autoguidance=1.5")
        guided = run(f"{table}.autoguidance=1.5", "r2id.train.guide_after=0.5")
        assert guided[table]["autoguidance"] == 1.5


def test_what_prepare_lacks_is_told_before_anything_starts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name, text in {"riae": RIAE, "r2id": R2ID, "pipeline": PIPELINE}.items():
        (tmp_path / f"{name}.toml").write_text(text.format(out=out))
    shards = f"prepare.out={tmp_path}/shards"
    for changes, reason in {
        ("prepare.dataset=folder",): "prepare.source: missing: dataset 'folder' needs the folder",
        ("prepare.dataset=folder", f"prepare.source={tmp_path}/x"): "prepare.source .*/x: no such",
        ("prepare.dataset=pictures",): "prepare.dataset 'pictures': must be one of 'digits'",
        ("prepare.partial=true",): "prepare.partial = True: dataset 'digits' takes no such option",
    }.items():
        config = load_config(tmp_path / "pipeline.toml", (shards, *changes))
        assert isinstance(config, PipelineRun)
        with pytest.raises(InputError, match=f"^{reason}"):
            pipeline.run_pipeline(config, tmp_path)
    assert not out.exists() and not (tmp_path / "shards").exists()
