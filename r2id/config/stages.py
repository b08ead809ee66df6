"""The configs of a pipeline's training stages, with what the pipeline sets in them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from r2id.config.files import load_config, override, read_stage
from r2id.config.pipeline import PipelineRun
from r2id.config.training import R2idRun, RiaeRun
from r2id.errors import InputError


class TrainingStage(NamedTuple):
    """A training stage of a pipeline."""

    file: Path
    overrides: tuple[str, ...]
    run: RiaeRun | R2idRun
    """What load_config makes of the file and the overrides."""


def find_stages(config: PipelineRun, base: Path) -> dict[str, TrainingStage]:
    """Return the stages that train, by the name of their table, in their order.

    What the pipeline sets comes last and wins. The files that it names are in ``base``. Raises
    InputError where one is not valid, or of another stage.
    """
    tracking = config.tracking.changes()
    tracking.pop("name", None)  # names the pipeline's run; a stage's run keeps its own name
    shared = {
        "data.shards": config.prepare.out,
        **{f"tracking.{name}": value for name, value in tracking.items()},
    }
    paths, found = config.stage_paths(), {}
    for name, stage in config.training_stages().items():
        file, kind = base / stage.config, "r2id" if name == "r2id" else "riae"
        # First, because the settings of a pipeline would be unknown to a file of another stage.
        if (own := read_stage(file)) != kind:
            raise InputError(f"{name}.config: {file} is of stage {own!r}, must be {kind!r}")
        values = (paths[name] | shared).items()
        overrides = (*stage.set, *(override(key, value) for key, value in values))
        run = load_config(file, overrides)
        assert not isinstance(run, PipelineRun), "its stage has been checked"
        found[name] = TrainingStage(file, overrides, run)
    return found
