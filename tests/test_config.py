"""Settings: strict, overridable, and the same after a round trip."""

import tomllib
from pathlib import Path

import pytest

from r2id.config import (
    EvaluateConfig,
    PipelineRun,
    R2idConfig,
    RiaeRun,
    SampleConfig,
    build,
    find_labels,
    load_config,
    override,
    parse_config,
    to_arguments,
    to_toml,
)
from r2id.config.arguments import find_option
from r2id.errors import InputError

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.toml"))


def table():
    return {"stage": "riae", "run": "runs/x", "data": {"shards": "data/x"}, "train": {"steps": 5}}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shipped_configs_are_valid_and_survive_a_round_trip(path):
    config = load_config(path)
    assert parse_config(tomllib.loads(to_toml(config))) == config
    if isinstance(config, PipelineRun):
        for stage in (config.riae, config.r2id):
            load_config(path.parent / stage.config, stage.set)


def test_overrides_are_typed():
    config = parse_config(
        table(), ["data.size=[28, 42]", "optim.lr=1e-4", "riae.linear=false", "run=runs/a b"]
    )
    assert isinstance(config, RiaeRun) and config.data.size == (28, 42) and config.optim.lr == 1e-4
    assert not config.riae.linear and config.run == Path("runs/a b")


def test_stage_overrides_in_a_pipeline():
    pipeline = pipeline_table(r2id={"config": "r2id.toml", "set": ["train.ema=0.9"]})
    config = parse_config(
        pipeline, ["riae.train.steps=3", "r2id.r2id.width=64", "evaluate.count=7"]
    )
    assert config.riae.set == ("train.steps=3",) and config.r2id.set == (
        "train.ema=0.9",
        "r2id.width=64",
    )
    assert config.evaluate.count == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=5", ["train.stepz", "'steps'"]),
        ("trian.steps=5", ["trian", "'train'"]),
        ("train.steps=many", ["train.steps = 'many'", "integer"]),
        ("train.steps=0", ["train.steps = 0", "1"]),
        ("train.steps=2.5", ["train.steps = 2.5", "integer"]),
        ("riae.linear=1", ["riae.linear = 1", "boolean"]),
        ("loss.encode_cloud=0.0", ["loss.encode_cloud = 0.0", "greater than 0"]),
        ("loss.magnify_scales=[2.0, 0.5]", ["magnify_scales = [2.0, 0.5]"]),
        ("riae.kind=near", ["riae.kind = 'near'", "'lattice'", "'attention'"]),
        ("data.size=[0, 4]", ["data.size.0 = 0", "1"]),
        ("engine.zero_stage=4", ["engine.zero_stage = 4", "0, 1, 2 or 3"]),
        ("train.steps.deep=4", ["train.steps.deep=4", "steps"]),
        ("nothing", ["'nothing'", "section.key=value"]),
        ("optim.lr=inf", ["optim.lr = inf", "finite"]),
        ("optim.clip=nan", ["optim.clip = nan", "finite"]),
        ("train.stall_seconds=inf", ["train.stall_seconds = inf", "finite"]),
        ("train.stall_seconds=1e10", ["train.stall_seconds = 1", "1000000000"]),
        ("train.stall_seconds=-1", ["train.stall_seconds = -1", "0"]),
        (f"seed={2**63}", [f"seed = {2**63}", str(2**63 - 1)]),
        ("optim.lr=1e-5", ["optim.lr_end = 0.0001", "at most lr = 1e-05"]),
    ],
)
def test_mistakes_are_named_in_one_line(override, words):
    with pytest.raises(InputError) as caught:
        parse_config(table(), [override])
    text = str(caught.value)
    assert "\n" not in text
    assert all(word in text for word in words), text


def test_classes_are_named_or_numbered():
    option = find_option(SampleConfig, "labels")
    assert option.read(["cat", "3"]) == ("cat", "3"), "names may be digits"
    with pytest.raises(InputError, match="--label '': must be the name of a class"):
        option.read([""])
    assert build(SampleConfig, {"labels": ["cat", "003", 4]}).labels == ("cat", "003", 4)
    for label in (-1, 1.5, "", True):
        with pytest.raises(InputError, match=r"labels\.1 = .*name of a class, or its number"):
            build(SampleConfig, {"labels": [0, label]})


def test_a_name_of_digits_is_no_number():
    padded = ("001", "002", "003", "004", "005")
    assert find_labels(["003", "005", "3", 3], 5, padded) == [2, 4, 3, 3]
    assert find_labels(["2", "10", 2, "0"], 3, ("1", "10", "2")) == [2, 1, 2, 0]
    for label in ("006", "000", "5", 5, "-1"):
        with pytest.raises(InputError, match=f"label {label}: must be 0 to 4, or one of 001, 002"):
            find_labels([label], 5, padded)


def test_a_mistake_is_one_where_another_default_depends_on_it():
    with pytest.raises(InputError, match=r"steps = 0: .* equal to 1$"):
        build(SampleConfig, {"steps": 0})


def test_heads_that_do_not_divide_the_width_are_named():
    with pytest.raises(InputError, match=r"width = 200: must be a multiple of its 3 heads"):
        build(R2idConfig, {"width": 200, "heads": 3})


def test_what_is_no_number_is_not_called_an_old_value(capsys):
    with pytest.raises(InputError, match="nan"):
        parse_config(table(), ["optim.lr=nan"])
    assert not capsys.readouterr().err


def test_an_unknown_key_is_named_before_what_is_missing():
    """A key may be missing because it is misspelt."""
    for misspelt, place in (("stpes", "train"), ("sards", "data")):
        right = {"stpes": "steps", "sards": "shards"}[misspelt]
        changed = table()
        changed[place] = {misspelt: changed[place][right]}
        with pytest.raises(InputError) as caught:
            parse_config(changed)
        text = str(caught.value)
        assert text.startswith(f"config: {place}.{misspelt}: unknown key; did you mean {right!r}?")
        assert text.endswith(f"; missing: {place}.{right}") and "\n" not in text
    with pytest.raises(InputError, match=r"config: data\.shards, train\.steps: missing, without"):
        parse_config({"stage": "riae", "run": "x", "data": {}, "train": {}})


def test_a_setting_without_its_section_is_told_where_it_is():
    with pytest.raises(InputError, match=r"steps: unknown key; did you mean 'train\.steps'"):
        parse_config(table(), ["steps=3"])


def test_lists_and_tables_are_told_by_example():
    path = next(path for path in CONFIGS if path.name == "small-r2id.toml")
    for setting, words in (
        ("data.size=32x32", r"data\.size = '32x32': must be a list in brackets, .* \[32, 32\] for"),
        ("data.size=[32]", r"data\.size: has only 1 of the values"),
        ("sample.sizes=[96, 96]", r"sizes\.0 = 96: must be a list .* \[\[32, 32\], "),
        ("r2id.attention=tiled", r"""attention = 'tiled': must be a list .* \["tiled"\]"""),
        ("r2id.levels=3", r"r2id\.levels = 3: must be a list of tables .* each of width, blocks$"),
        ("r2id.levels=[2]", r"r2id\.levels\.0 = 2: must be a table of width, blocks$"),
        ("optim=3", r"optim = 3: must be a table of lr, "),
    ):
        with pytest.raises(InputError, match=words):
            load_config(path, [setting])


@pytest.mark.parametrize("section", ["sample", "evaluate"])
def test_samples_have_seeds_and_guidance_within_their_range(section):
    schema = {"sample": SampleConfig, "evaluate": EvaluateConfig}[section]
    last = 2**63 - 1
    count = {"count": 3, **({"invariance_count": 2} if section == "evaluate" else {})}
    assert build(schema, {"seed": last - 2, **count}).seed == last - 2
    for values, words in (
        ({"seed": last - 1, **count}, f"seed = {last - 1}: must be at most {last - 2} for 3"),
        ({"seed": last + 1}, f"seed = {last + 1}: .*{last}"),
        ({"seed": -1}, "seed = -1: .*0"),
        ({"guidance": 1e38}, r"guidance.* = 1e\+38: .*100"),
        ({"guidance": float("inf")}, "guidance.* = inf: .*finite"),
        ({"guidance": float("nan")}, "guidance.* = nan: .*finite"),
    ):
        with pytest.raises(InputError, match=words):
            build(schema, values)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["riae.heads=4"], ["config: riae.heads = 4", "riae.kind = 'attention'", "'lattice'"]),
        (["riae.kind=attention", "riae.features=3"], ["features = 3", "'lattice'", "'attention'"]),
        (["riae.downsample=3.5"], ["config: riae.downsample = 3.5", "whole number"]),
        (["riae.kind=attention", "riae.encoder_blocks=0"], ["encoder_blocks", "at least 1"]),
        (["riae.kind=attention", "riae.width=30"], ["riae.width = 30", "multiple of its 8 heads"]),
        (["riae.kind=attention", "riae.width=48"], ["riae.width = 48", "8 heads, each at least 7"]),
        (
            ["riae.kind=attention", "riae.width=64", "riae.heads=4", "riae.pixel_width=50"],
            ["riae.pixel_width = 50", "3 heads"],
        ),
        (["loss.jitter=0.5"], ["loss.jitter = 0.5", "'lattice'"]),
        (["riae.kind=attention", "loss.magnify=0.5"], ["loss.magnify = 0.5", "'attention'"]),
    ],
)
def test_settings_of_the_other_kind_of_riae_are_named(settings, words):
    with pytest.raises(InputError) as caught:
        parse_config(table(), settings)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_objective_and_schedule_must_fit():
    r2id = {**table(), "stage": "r2id", "codec": "runs/riae", "diffusion": {"objective": "flow"}}
    with pytest.raises(InputError, match=r"'flow'.*'cosine'"):
        parse_config(r2id)


def test_files_that_are_no_configs(tmp_path):
    for name, content, words in (
        ("none.toml", None, "none.toml"),
        ("bad.toml", "a = = 1", r"bad\.toml.*line 1"),
        ("other.toml", "stage = 'vae'", "'vae'.*'riae', 'r2id', 'pipeline'"),
    ):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=words):
            load_config(tmp_path / name)


@pytest.mark.parametrize("value", ["plain", "two words", 'a "b" \\ c\n', "Ünïcode 🙂", "5", "true"])
def test_an_override_is_read_as_it_was_written(value):
    assert parse_config(table(), [override("tracking.name", value)]).tracking.name == value
    options = {"a": {"b c": [1, value]}, "on": True}
    assert (
        parse_config(table(), [override("engine.deepspeed", options)]).engine.deepspeed == options
    )
    config = parse_config(table(), [override("engine.deepspeed", options)])
    assert parse_config(tomllib.loads(to_toml(config))) == config


def pipeline_table(**tables):
    return {
        "stage": "pipeline",
        "name": "n",
        "out": "runs/n",
        "prepare": {"dataset": "digits", "out": "data/d"},
        "riae": {"config": "riae.toml"},
        "r2id": {"config": "r2id.toml"},
        **tables,
    }


def test_what_a_pipeline_sets_is_all_that_it_sets_after_a_round_trip():
    config = parse_config(pipeline_table(sample={"guidance": 2.0, "labels": [3]}, evaluate={}))
    for again in (config, parse_config(tomllib.loads(to_toml(config)))):
        assert again.sample.changes() == {"guidance": 2.0, "labels": (3,)}
        assert again.evaluate.changes() == again.encode.changes() == again.tracking.changes() == {}


def test_arguments_are_of_what_is_set():
    config = parse_config(
        pipeline_table(
            sample={
                "sizes": [[8, 8], [6, 9]],
                "labels": [3, 1],
                "guidance": 2.0,
                "guidance_interval": [0.25, 1.0],
            },
            evaluate={"invariance": True, "extractor": None},
        )
    )
    assert isinstance(config, PipelineRun)
    sample = "--guidance 2.0 --guidance-interval 0.25,1.0 --size 8x8 --size 6x9 --label 3 --label 1"
    assert to_arguments(config.sample) == sample.split()
    assert to_arguments(config.evaluate) == ["--invariance"]
