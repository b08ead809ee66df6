"""`r2id settings`: every setting of the schemas, as configs write them."""

from __future__ import annotations

import json
import tomllib

import pytest

from r2id.config import R2idRun, RiaeRun, load_config, to_toml
from r2id.config.files import schemas
from r2id.config.reference import list_settings
from tests.conftest import CONFIGS


def flat(table: dict, prefix: str = "") -> dict:
    """Settings of a table, as ``section.key``."""
    found = {}
    for key, value in table.items():
        inner = isinstance(value, dict) and key != "deepspeed"
        found |= flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


@pytest.mark.parametrize("stage", list(schemas()))
def test_every_setting_is_listed_with_a_type_and_a_meaning(stage: str) -> None:
    found = list_settings(stage)
    assert len({setting["name"] for setting in found}) == len(found)
    for setting in found:
        assert setting["description"] and setting["description"][-1] in ".:;", setting
        assert "table" not in setting["type"] or setting["name"] == "engine.deepspeed"
    if stage != "pipeline":
        config = load_config(CONFIGS / "digits" / f"{stage}.toml")
        assert isinstance(config, RiaeRun | R2idRun)
        written = flat(tomllib.loads(to_toml(config))).keys() - {"stage"}
        assert written <= {setting["name"] for setting in found}


def test_a_setting_says_what_is_allowed_and_what_a_file_sets() -> None:
    path = CONFIGS / "mnist" / "pixel-hourglass-r2id.toml"
    found = {s["name"]: s for s in list_settings("r2id", load_config(path, ["optim.lr=0.25"]))}
    assert found["optim.lr"] == {
        "name": "optim.lr",
        "type": "number > 0",
        "default": "0.001",
        "description": "Peak learning rate.",
        "value": "0.25",
    }
    assert found["train.steps"]["default"] is None and found["train.keep"]["value"] is None
    assert found["engine.zero_stage"]["type"] == "0 | 1 | 2 | 3"
    assert found["data.size"]["type"] == "[integer ≥ 1, integer ≥ 1]"
    assert found["sample.guidance"]["type"] == "number ≥ 0 and ≤ 100"
    assert found["r2id.levels"]["type"] == "list of {width, blocks}"
    levels = tomllib.loads(f"levels = {found['r2id.levels']['value']}")["levels"]
    assert [set(level) for level in levels] == [{"width", "blocks"}] * len(levels) and levels


def test_the_command_lists_them(r2id) -> None:
    code, out, _ = r2id("settings", "riae", "--json")
    assert code == 0 and json.loads(out)["settings"] == list_settings("riae")
    config = CONFIGS / "digits" / "pipeline.toml"
    code, out, _ = r2id("settings", config, "evaluate.count=7")
    lines = out.splitlines()
    assert code == 0 and "evaluate.count: integer ≥ 1, default 1000, here 7" in lines
    assert "    Number of samples per size that are drawn and scored." in lines
    code, _, err = r2id("settings", "photos")
    assert code == 2 and "'photos': must be one of riae, r2id, pipeline" in err
