"""``r2id plan`` of any config: a stage's plan, or those of a pipeline's stages, and their sum."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from r2id.config import PipelineRun, RiaeConfig, RiaeRun, find_stages, load_config
from r2id.errors import InputError
from r2id.training.communication import Gpu
from r2id.training.planner import describe, describe_days, plan


def plan_config(
    path: Path,
    overrides: tuple[str, ...] = (),
    *,
    gpus: int,
    gpu: Gpu,
    share: float,
    riae: Path | None = None,
    classes: int | None = None,
) -> dict[str, Any]:
    """Compute everything that ``r2id plan`` prints; see ``plan``.

    A pipeline's result has those of its "stages", by name, and the sum of their "days". Its R2ID is
    planned with its own RIAE. Raises InputError where ``riae`` names another one, too.
    """
    config = load_config(path, overrides)
    known: dict[str, Any] = {"gpus": gpus, "gpu": gpu, "share": share, "classes": classes}
    if not isinstance(config, PipelineRun):
        return plan(path, overrides, riae=riae, **known)
    if riae is not None:
        raise InputError(
            f"riae {riae}: is for the config of an R2ID; a pipeline plans its own RIAE"
        )
    codec: RiaeConfig | None = None
    stages = {}
    for name, stage in find_stages(config, path.parent).items():
        stages[name] = plan(stage.file, stage.overrides, riae=codec, **known)
        codec = stage.run.riae if isinstance(stage.run, RiaeRun) else codec
    return {
        "config": str(path),
        "stage": config.stage,
        "gpus": gpus,
        "gpu": gpu.name,
        "stages": stages,
        "days": sum(found["days"] for found in stages.values()),
    }


def describe_config(result: dict[str, Any]) -> list[str]:
    """Describe the result of ``plan_config`` in lines for people."""
    if "stages" not in result:
        return describe(result)
    lines = []
    for name, found in result["stages"].items():
        lines += [f"{name}, {found['config']}", *(f"  {line}" for line in describe(found))]
    return [
        *lines,
        f"pipeline: {describe_days(result['days'])} of training on {result['gpus']} × "
        f"{result['gpu']}; shards, latents, samples and the report take more",
    ]
