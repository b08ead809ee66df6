"""The training loop: batches → loss → engine. Everything else that a run does is a callback."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from r2id import dist, rng
from r2id.checkpoints import Checkpoint
from r2id.config import OptimConfig, R2idRun, RiaeRun
from r2id.errors import NonFiniteError, Stopped
from r2id.progress import say
from r2id.training.batch_split import micro_batch_size
from r2id.training.blocks import prepare_blocks
from r2id.training.callbacks import Callbacks, make_callbacks
from r2id.training.engines import make_engine
from r2id.training.nonfinite import blame
from r2id.training.precision import resolve_precision
from r2id.training.resume import is_finished, restore, start_folder
from r2id.training.state import MicroBatchResult, TrainState
from r2id.training.tasks import Batch, make_task


def train(config: RiaeRun | R2idRun, *, profile: bool = False) -> dict[str, Any]:
    """Train one model to its last step, going on from its run's newest checkpoint if there is one.

    ``profile`` writes a trace of ten steps to RUN/profile. Returns the path of the last checkpoint,
    its step, the last figures logged (losses) and the rates of this call's steps (see Meter); only
    checkpoint and step when the run was finished before.

    Raises InputError when config, data and run directory do not fit together, NonFiniteError when a
    gradient is not finite, before it reaches the weights, and Stopped after SIGTERM or SIGINT, with
    everything saved; and WorkError when another process trains in the run directory.
    """
    world = dist.init()
    with dist.exclusive(config.run):  # from the look for the newest checkpoint on
        return _train(config, world, profile)


def _train(config: RiaeRun | R2idRun, world: dist.World, profile: bool) -> dict[str, Any]:
    """See ``train``, which no other process does meanwhile."""
    newest = Checkpoint.open_newest(config.run)
    if newest is not None and is_finished(config, newest):
        return {"checkpoint": newest.path, "step": newest.step}
    recorded = newest.meta.config["train"]["precision"] if newest is not None else None
    config = resolve_precision(config, world.device, recorded)
    micro_batch = micro_batch_size(config.train, world.world_size)
    task = make_task(config, world, micro_batch, newest)
    if newest is None and config.init_from is None:
        task.start()
    prepare_blocks(task.module.model.blocks(), config.train)
    engine = make_engine(
        task.module, optim=config.optim, train=config.train, engine=config.engine, world=world
    )
    state = TrainState(task, engine, profile)
    restore(state, newest)
    start_folder(state)
    run(state, make_callbacks())
    return {"checkpoint": state.checkpoint, "step": state.step, **state.figures}


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
            _step_or_skip(state, previous)
            state.step += 1
            callbacks.post_step(state)
            if state.stopping:
                raise Stopped(
                    f"{state.folder}: step {state.step} of {state.config.train.steps} saved; "
                    "run the same command again to go on"
                )


def step(state: TrainState) -> None:
    """Make one optimizer step on the state's micro-batches."""
    # Random draws are keyed by sample, except those of torch's own generator (dropout). These are
    # keyed by step and rank, so that a resumed run draws the same as an uninterrupted one.
    torch.manual_seed(int(rng.fold(state.config.seed, state.step, dist.rank())))
    results = []
    for batch in state.micro_batches:
        loss, figures = _forward(state, batch, state.step)
        state.engine.backward(loss, len(state.micro_batches))
        figures = {"loss": loss.detach(), **figures}
        results.append(MicroBatchResult(figures, len(batch["index"]), state.task.image_size(batch)))
    state.lr = learning_rate(state.step, state.config.optim, state.config.train.steps)
    state.grad_norm = state.engine.step(state.lr, state.step)
    state.updated = True
    state.results = results
    state.samples += sum(result.images for result in results) * dist.world_size()


def learning_rate(step: int, optim: OptimConfig, total: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of a run with ``total`` steps.

    It rises linearly to ``lr`` within the first ``warmup`` steps, and then falls along a cosine to
    ``lr_end`` at the last step (Loshchilov & Hutter 2017, "SGDR", arXiv:1608.03983).
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, total - 1 - optim.warmup))
    return optim.lr_end + 0.5 * (optim.lr - optim.lr_end) * (1 + math.cos(math.pi * progress))


def _step_or_skip(state: TrainState, previous: list[Batch]) -> None:
    """Make a step, or skip it when its gradient is not finite and the config allows that.

    ``previous``: the micro-batches of the step before. Raises NonFiniteError, naming the module and
    the samples at fault, when ``train.skip_nonfinite`` steps have been skipped already.
    """
    allowed = state.config.train.skip_nonfinite
    state.results, state.updated = [], False
    try:
        step(state)
    except NonFiniteError as error:
        # On a GPU the local engine finds out one step late (see Engine.step). Then the previous
        # step is the culprit; the device has already kept it from the weights. The gradients of
        # this step are complete and not yet applied, so that this step is made after all.
        late = error.step < state.step
        message = f"{error}; {_blame(state, previous if late else state.micro_batches, error.step)}"
        state.skipped += 1
        if state.skipped > allowed:
            raise NonFiniteError(message, error.step) from None
        say(f"skipped {state.skipped} of {allowed}: {message}")
        state.grad_norm = state.engine.step(state.lr, state.step) if late else math.nan
        state.updated = late


def _blame(state: TrainState, micro_batches: list[Batch], step: int) -> str:
    """Describe where a step went wrong: the module, found on this rank, and the samples."""

    def forward() -> None:
        # The seed that ``step`` used, so that dropout draws the same again.
        torch.manual_seed(int(rng.fold(state.config.seed, step, dist.rank())))
        for batch in micro_batches:
            _forward(state, batch, step)

    samples = [name for batch in micro_batches for name in batch["sample_ids"]]
    shown = ", ".join(samples[:3]) + (f", … ({len(samples)})" if len(samples) > 3 else "")
    return f"{blame(state.task.module, forward)}; samples {shown}"


def _forward(state: TrainState, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Move a micro-batch to the device and compute its loss and figures."""
    device = state.engine.device
    batch = {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }
    return state.engine.forward({**state.task.inputs(batch), "step": step})
