"""Settings: strict, overridable, and the same after a round trip."""

import tomllib
from pathlib import Path

import pytest

from r2id.config import PipelineRun, RiaeRun, load_config, parse_config, to_toml
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
        table(), ["data.size=[28, 42]", "optim.lr=1e-4", "riae.bounded=true", "run=runs/a b"]
    )
    assert isinstance(config, RiaeRun) and config.data.size == (28, 42) and config.optim.lr == 1e-4
    assert config.riae.bounded and config.run == Path("runs/a b")


def test_stage_overrides_in_a_pipeline():
    pipeline = {
        "stage": "pipeline",
        "name": "n",
        "out": "runs/n",
        "prepare": {"dataset": "digits", "out": "data/d"},
        "riae": {"config": "riae.toml"},
        "r2id": {"config": "r2id.toml", "set": ["train.ema=0.9"]},
    }
    config = parse_config(
        pipeline, ["riae.train.steps=3", "r2id.r2id.width=64", "evaluate.count=7"]
    )
    assert config.riae.set == ("train.steps=3",) and config.r2id.set == (
        "train.ema=0.9",
        "r2id.width=64",
    )
    assert config.evaluate.count == 7


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=5", "train.stepz: unknown key; did you mean 'steps'?"),
        ("trian.steps=5", "trian: unknown key; did you mean 'train'?"),
        ("train.steps=many", "train.steps = 'many': Input should be a valid integer"),
        ("train.steps=0", "train.steps = 0: Input should be greater than or equal to 1"),
        ("train.steps=2.5", "train.steps = 2.5: Input should be a valid integer"),
        ("riae.bounded=1", "riae.bounded = 1: Input should be a valid boolean"),
        ("loss.encode_cloud=0.0", "loss.encode_cloud = 0.0: Input should be greater than 0"),
        (
            "riae.decode_scales=[2.0, 0.5]",
            "decode_scales = [2.0, 0.5]: must be positive, the smaller first",
        ),
        ("riae.attention=near", "riae.attention = 'near': Input should be 'cloud' or 'tiled'"),
        ("data.size=[0, 4]", "data.size.0 = 0: Input should be greater than or equal to 1"),
        ("engine.zero_stage=4", "engine.zero_stage = 4: Input should be 0, 1, 2 or 3"),
        ("train.steps.deep=4", "steps is a value, not a section"),
        ("nothing", "override 'nothing': must look like section.key=value"),
    ],
)
def test_mistakes_are_named_in_one_line(override, message):
    with pytest.raises(InputError) as caught:
        parse_config(table(), [override])
    text = str(caught.value)
    assert "\n" not in text
    assert message in text


def test_objective_and_schedule_must_fit():
    r2id = {**table(), "stage": "r2id", "codec": "runs/riae", "diffusion": {"objective": "flow"}}
    with pytest.raises(InputError, match="objective 'flow' does not go with schedule 'cosine'"):
        parse_config(r2id)


def test_files_that_are_no_configs(tmp_path):
    with pytest.raises(InputError, match="no such config file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("a = = 1")
    with pytest.raises(InputError, match=r"bad.toml: not a readable TOML file: .*line 1"):
        load_config(tmp_path / "bad.toml")
    (tmp_path / "other.toml").write_text("stage = 'vae'")
    with pytest.raises(
        InputError, match="stage = 'vae': must be one of 'riae', 'r2id', 'pipeline'"
    ):
        load_config(tmp_path / "other.toml")
