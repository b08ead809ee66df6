"""The training loop: batches → loss → engine. Everything else that a run does is a callback."""

from __future__ import annotations

from typing import Any

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import R2idRun, RiaeRun
from r2id.config.batch_split import micro_batch_size
from r2id.errors import Stopped
from r2id.training.blocks import prepare_blocks
from r2id.training.callbacks import Callbacks, make_callbacks
from r2id.training.determinism import deterministic
from r2id.training.engines import make_engine
from r2id.training.engines.settings import engine_kind
from r2id.training.out_of_memory import advise_on_out_of_memory
from r2id.training.precision import resolve_precision
from r2id.training.resume import is_finished, restore, say_finished, start_folder
from r2id.training.state import TrainState
from r2id.training.step import step_or_skip
from r2id.training.tasks import make_task


def train(config: RiaeRun | R2idRun, *, profile: bool = False) -> dict[str, Any]:
    """Train one model to its last step, going on from its run's newest checkpoint if there is one.

    ``profile`` writes a trace of ten steps to RUN/profile. Returns the path of the last checkpoint,
    its step, the last figures logged (losses) and the rates of this call's steps (see Meter); only
    checkpoint and step when the run was finished before.

    Raises InputError when config, data and run directory do not fit together, NonFiniteError when a
    gradient is not finite, before it reaches the weights, and Stopped after a signal, with
    everything saved; and WorkError when another process trains in the run directory, and when
    memory runs out, with the settings that need less.
    """
    with deterministic(config.train.deterministic):
        world = dist.init()
        with dist.exclusive(config.run):  # from the look for the newest checkpoint on
            return _train(config, world, profile)


def _train(config: RiaeRun | R2idRun, world: dist.World, profile: bool) -> dict[str, Any]:
    """See ``train``, which no other process does meanwhile."""
    newest = Checkpoint.open_newest(config.run)
    if newest is not None and is_finished(config, newest):
        if dist.is_main():
            say_finished(config, newest)
        return {"checkpoint": newest.path, "step": newest.step}
    recorded = newest.meta.config["train"]["precision"] if newest is not None else None
    config = resolve_precision(config, world.device, recorded)
    micro_batch = micro_batch_size(config.train, world.world_size)
    with advise_on_out_of_memory(config, world):
        task = make_task(config, world, micro_batch, newest)
        if newest is None and config.init_from is None:
            task.start()
        kind = engine_kind(config.train, config.engine, world.world_size)
        prepare_blocks(
            task.module.model.blocks(),
            config.train,
            world.device,
            shapes=task.shapes,
            gathered=kind == "deepspeed" and config.engine.zero_stage == 3,
        )
        engine = make_engine(
            task.module, optim=config.optim, train=config.train, engine=config.engine, world=world
        )
        state = TrainState(task, engine, profile)
        restore(state, newest)
        start_folder(state)
        run(state, make_callbacks())
    skipped = {"skipped_steps": state.skipped} if state.skipped else {}
    return {"checkpoint": state.checkpoint, "step": state.step, **state.figures, **skipped}


def run(state: TrainState, callbacks: Callbacks) -> None:
    """Train from the state's step to the last one.

    Raises Stopped after the step in which a signal came.
    """
    with callbacks.around(state):
        batches = state.task.loader(state.step)
        while not state.finished:
            callbacks.pre_load(state)
            # The previous batches are kept for one more step: a gradient that is not finite may be
            # found one step late, and its samples are then named.
            state.micro_batches, previous = next(batches), state.micro_batches
            callbacks.pre_step(state)
            step_or_skip(state, previous)
            state.step += 1
            callbacks.post_step(state)
            if state.stopping:
                raise Stopped(
                    f"{state.folder}: step {state.step} of {state.config.train.steps} saved; "
                    "run the same command again to go on"
                )
