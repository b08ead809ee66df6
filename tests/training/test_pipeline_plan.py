"""`r2id plan` of a pipeline: the plans of its stages, and their sum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from r2id.errors import InputError
from r2id.training.communication import GPUS
from r2id.training.pipeline_plan import describe_config, plan_config
from tests.conftest import CONFIGS

DIGITS, FACES = CONFIGS / "digits", CONFIGS / "photos" / "faces-pipeline.toml"
MACHINE = {"gpus": 2, "gpu": GPUS["h200"], "share": 0.4}


def test_a_pipeline_is_planned_stage_by_stage(tmp_path: Path) -> None:
    changes = f"prepare.out={tmp_path}/shards", "riae.riae.latent_channels=8", "r2id.train.steps=10"
    sized = "riae.data.size=[16, 16]", "r2id.data.size=[16, 16]"
    found = plan_config(DIGITS / "pipeline.toml", (*changes, *sized), classes=10, **MACHINE)
    riae, r2id = found["stages"]["riae"], found["stages"]["r2id"]
    assert list(found["stages"]) == ["riae", "r2id"]
    assert riae["shards"] == r2id["shards"] == f"{tmp_path}/shards"
    assert (r2id["steps"], r2id["image"], r2id["gpu"]) == (10, [16, 16], "h200")
    # Mirrored or not, latents have the channels that the pipeline gives its RIAE.
    assert r2id["disk"]["latents_per_image"] == 4 * 8 * 8 * 8
    assert found["days"] == riae["days"] + r2id["days"]
    lines = describe_config(found)
    assert lines[0] == f"riae, {DIGITS / 'riae.toml'}" and f"r2id, {DIGITS / 'r2id.toml'}" in lines
    assert "of training on 2 × h200" in lines[-1]
    assert json.loads(json.dumps(found)) == found


@pytest.mark.slow
def test_a_finetuned_riae_is_planned_too(tmp_path: Path) -> None:
    found = plan_config(FACES, (f"prepare.out={tmp_path}",), **MACHINE)
    assert list(found["stages"]) == ["riae", "finetune", "r2id"]
    assert found["stages"]["finetune"]["pca"] is None  # it begins with the first one's weights


def test_another_riae_is_refused() -> None:
    with pytest.raises(InputError, match=r"riae.*a pipeline plans its own"):
        plan_config(DIGITS / "pipeline.toml", riae=DIGITS / "riae.toml", **MACHINE)
