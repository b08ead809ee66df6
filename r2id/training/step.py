"""One optimizer step: micro-batches → loss → engine; or its being skipped."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from r2id import dist, rng
from r2id.config import OptimConfig
from r2id.errors import NonFiniteError
from r2id.progress import say
from r2id.training.nonfinite import blame
from r2id.training.state import MicroBatchResult, TrainState
from r2id.training.tasks import Batch


def step(state: TrainState) -> None:
    """Make one optimizer step on the state's micro-batches."""
    # Random draws are keyed by sample, except those of torch's own generator (dropout). These are
    # keyed by step and rank, so that a resumed run draws the same as an uninterrupted one.
    torch.manual_seed(int(rng.fold(state.config.seed, state.step, dist.rank())))
    own, images = _count_images(state)
    # Engines take the mean over ranks; each image of a step is to count as much as any other.
    weight = own * dist.world_size() / images
    results = []
    for batch in state.micro_batches:
        loss, figures = _forward(state, batch, state.step)
        state.engine.backward(loss if weight == 1 else weight * loss, len(state.micro_batches))
        figures = {"loss": loss.detach(), **figures}
        results.append(MicroBatchResult(figures, len(batch["index"]), state.task.image_size(batch)))
    state.lr = learning_rate(state.step, state.config.optim, state.config.train.steps)
    state.grad_norm = state.engine.step(state.lr, state.step)
    state.updated = True
    state.results = results
    state.samples += images


def _count_images(state: TrainState) -> tuple[int, int]:
    """Return the number of images of a step on this rank, and on all of them."""
    own = sum(len(batch["index"]) for batch in state.micro_batches)
    ranks, data = dist.world_size(), state.config.data
    if ranks > 1 and data.stream and data.batch_pixels:
        # Each rank has images of another size, and so another number of them.
        return own, int(dist.all_reduce_sum(torch.tensor(own, device=state.engine.device)))
    return own, own * ranks


def learning_rate(step: int, optim: OptimConfig, total: int) -> float:
    """Return the learning rate of step ``step`` (from 0) of a run with ``total`` steps.

    It rises linearly to ``lr`` within the first ``warmup`` steps, and then falls along a cosine to
    ``lr_end`` at the last step (Loshchilov & Hutter 2017, "SGDR", arXiv:1608.03983).
    """
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    progress = min(1.0, (step - optim.warmup) / max(1, total - 1 - optim.warmup))
    return optim.lr_end + 0.5 * (optim.lr - optim.lr_end) * (1 + math.cos(math.pi * progress))


def step_or_skip(state: TrainState, previous: list[Batch]) -> None:
    """Make a step, or skip it when its gradient is not finite and the config allows that.

    ``previous``: the micro-batches of the step before. Raises NonFiniteError, naming the module and
    the samples at fault, when ``train.skip_nonfinite`` steps have been skipped already.
    """
    state.results, state.updated = [], False
    try:
        step(state)
    except NonFiniteError as error:
        # On a GPU the local engine finds out one step late (see Engine.step). Then the previous
        # step is the culprit; the device has already kept it from the weights. The gradients of
        # this step are complete and not yet applied, so that this step is made after all.
        late = error.step < state.step
        _skip(state, error, previous if late else state.micro_batches)
        state.grad_norm = state.engine.step(state.lr, state.step) if late else math.nan
        state.updated = late


def confirm_last_step(state: TrainState) -> None:
    """Make sure that the last step's gradient was finite, or skip that step.

    Call it after a step, before the engine's state is read: see ``step_or_skip`` for what it raises
    and why it is not known before.
    """
    try:
        state.engine.confirm()
    except NonFiniteError as error:
        _skip(state, error, state.micro_batches)
        state.results, state.updated, state.grad_norm = [], False, math.nan


def _skip(state: TrainState, error: NonFiniteError, micro_batches: list[Batch]) -> None:
    """Count a step of these micro-batches as skipped, or raise if none may be any more."""
    allowed = state.config.train.skip_nonfinite
    message = f"{error}; {_blame(state, micro_batches, error.step)}"
    state.skipped += 1
    if state.skipped > allowed:
        if error.step == state.start > 0:
            message += (
                f"; this is the first step after the checkpoint of step {state.start}: if it fails "
                f"again, remove that one from {state.folder / 'checkpoints'} to go on from the one "
                "before it, or begin anew"
            )
        raise NonFiniteError(message, error.step) from None
    say(f"skipped {state.skipped} of {allowed}: {message}")


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
    # Numbers stay on the CPU, where keys of random numbers are made of them.
    batch = {
        key: value.to(device, non_blocking=True)
        if isinstance(value, Tensor) and key not in ("index", "draw")
        else value
        for key, value in batch.items()
    }
    return state.engine.forward({**state.task.inputs(batch), "step": step})
