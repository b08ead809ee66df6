"""Where a run begins: at its own newest checkpoint, or else at step 0.

At step 0 the weights are random, or those of another run (``init_from``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from r2id import dist
from r2id.checkpoints import Checkpoint, writing
from r2id.checkpoints.reading import resume
from r2id.config import R2idRun, RiaeRun, to_toml
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.files import sha256_file, write_atomic
from r2id.models.codec import PIXELS
from r2id.progress import say
from r2id.training.chosen_codec import choose_codec
from r2id.training.engines import Engine
from r2id.training.state import TrainState
from r2id.training.tasks import Task

_SELECTION = ("train_split", "size", "max_pixels", "window", "flip", "batch_pixels", "shuffle")
"""Settings of the data section that decide which samples a step holds, and in which form."""
_FACTS = {"digest": "data.shards of digest", "codec_hash": "codec of hash"}
"""Names of facts for which a setting is to blame."""


def is_finished(config: RiaeRun | R2idRun, newest: Checkpoint) -> bool:
    """Tell whether a run with this newest checkpoint has been trained to its last step already.

    False when settings, data or codec have changed since. Neither data nor weights are loaded, so
    that a pipeline that is started again passes a finished stage quickly.
    """
    meta = newest.meta
    if meta.stage != config.stage or meta.step < config.train.steps:
        return False
    facts = {"digest": ShardSet.open(config.data.shards, config.data.stream).digest}
    if isinstance(config, R2idRun):
        codec = choose_codec(config, newest)
        facts["codec_hash"] = codec.identity if codec else PIXELS
    elif config.loss.perceptual and config.loss.perceptual_file is not None:
        if not config.loss.perceptual_file.is_file():
            return False  # training will say so
        facts["perceptual_hash"] = sha256_file(config.loss.perceptual_file)
    recorded = _essentials(meta.config, meta.model)
    current = _essentials(config.model_dump(mode="json"), facts)
    # A setting that the checkpoint lacks is newer than the checkpoint, and is not compared.
    return all(recorded.get(name, value) == value for name, value in current.items())


def restore(state: TrainState, newest: Checkpoint | None) -> None:
    """Load the run's newest checkpoint if there is one, or else the weights of ``init_from``.

    With neither, the weights stay as the task has drawn them. Raises InputError when a checkpoint
    does not fit the config.
    """
    if newest is not None:
        _check_same_run(state.task, newest)
        resume(newest, state.engine.check, state.engine.load)
        state.start, state.step, state.samples = newest.step, newest.step, newest.meta.samples
    elif state.config.init_from is not None:
        _load_initial_weights(state.engine, state.config, state.config.init_from)


def start_folder(state: TrainState) -> None:
    """Make the run directory, write its config, and remove what an interrupted process left."""
    if dist.is_main():
        write_atomic(state.folder / "config.toml", to_toml(state.config).encode())
        writing.tidy(state.folder, state.start)


def _load_initial_weights(engine: Engine, config: RiaeRun | R2idRun, path: Path) -> None:
    """Load the averaged weights of the checkpoint at ``path`` into an engine at step 0.

    Raises InputError, naming a tensor and a setting that differs, when its architecture differs.
    """
    checkpoint = Checkpoint.open(path)
    meta = checkpoint.meta
    if meta.stage != config.stage:
        raise InputError(
            f"init_from = {str(path)!r}: has weights of stage {meta.stage!r}, not {config.stage!r}"
        )
    here, there = config.model_dump(mode="json")[config.stage], meta.config[meta.stage]
    try:
        resume(checkpoint, engine.check_averages, engine.load_averages)
    except InputError as error:
        differing = [
            f"{config.stage}.{name} = {there[name]!r} there and {value!r} here"
            for name, value in here.items()
            if there.get(name, value) != value
        ]
        message = "; ".join([f"init_from = {str(path)!r}: {error}", *differing[:1]])
        raise InputError(message) from None
    # Weights depend on it, and their shapes do not show it.
    if here.get("lapped") != there.get("lapped"):
        raise InputError(
            f"init_from = {str(path)!r}: riae.lapped = {there['lapped']} there and "
            f"{here['lapped']} here"
        )
    say(f"{path}: beginning with its averaged weights, of step {meta.step}")


def _check_same_run(task: Task, newest: Checkpoint) -> None:
    """Raise InputError when the newest checkpoint in the run directory belongs to another run."""
    folder, meta = task.config.run, newest.meta
    if meta.stage != task.config.stage:
        raise InputError(
            f"{folder}: holds a run of stage {meta.stage!r}, not {task.config.stage!r}: "
            "choose another run directory"
        )
    recorded = _essentials(meta.config, meta.model)
    for name, value in _essentials(task.config.model_dump(mode="json"), task.facts).items():
        if recorded.get(name, value) != value:
            raise InputError(
                f"{folder}: holds a run with {name} = {_shown(recorded[name])}, not "
                f"{_shown(value)}: choose another run directory, or remove this one to start over"
            )
    if dist.is_main():
        other = _other_settings(task.config.model_dump(mode="json"), newest)
        say(f"{newest.path}: going on from step {meta.step}{other}")


def say_finished(config: RiaeRun | R2idRun, newest: Checkpoint) -> None:
    """Say that a run is finished if it would have gone on with other settings than before."""
    settings = config.model_dump(mode="json")
    if config.train.precision == "auto":  # the run decided it when it began
        settings["train"]["precision"] = newest.meta.config["train"]["precision"]
    if other := _other_settings(settings, newest):
        say(f"{newest.path}: finished at step {newest.step}{other}")


def _other_settings(settings: Mapping[str, Any], newest: Checkpoint) -> str:
    changed = _changes(newest.meta.config, settings)
    return f", with other settings than before: {', '.join(changed)}" if changed else ""


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings that differ, as ``section.key = old → new``; new settings are left out."""
    changes = []
    for name, value in now.items():
        old = before.get(name, value)
        if isinstance(value, dict) and isinstance(old, dict):
            changes += _changes(old, value, f"{prefix}{name}.")
        elif old != value:
            changes.append(f"{prefix}{name} = {old} → {value}")
    return changes


def _essentials(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Return the settings and facts that may not change between two starts of a run, by name."""
    essentials = {
        "seed": config["seed"],
        "train.batch": config["train"]["batch"],
        "train.ema_profiles": config["train"]["ema_profiles"],
        "train.guide_after": config["train"].get("guide_after"),  # newer than some checkpoints
    }
    for name in _SELECTION:
        if name in config["data"]:  # absent from a checkpoint older than the setting
            essentials[f"data.{name}"] = config["data"][name]
    for section in (config["stage"], "loss", "diffusion"):
        for key, value in config.get(section, {}).items():
            if key != "perceptual_file":  # like a codec's below: its hash is recorded
                essentials[f"{section}.{key}"] = value
    for key, value in facts.items():
        if key != "codec":  # its path may change; codec_hash tells whether it is the same
            essentials[_FACTS.get(key, f"recorded {key}")] = value
    return essentials


def _shown(value: Any) -> str:
    """Show a value in a line; of a hash, twelve digits."""
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
