"""The callback interface of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType

from r2id.training.state import TrainState


class Callback:
    """Something that a run does beside training. Each method does nothing unless overridden.

    Every process calls every method, so that collective operations are allowed, and what is for one
    process alone must ask ``dist.is_main()``. Callbacks keep no state that a resumed run needs. A
    resumed run goes on from ``state.start``: a file that grows with the steps may hold later ones,
    of a process that was killed, which are made again.

    ``state.results`` has the losses of the last step, micro-batch by micro-batch, of this process
    alone and on its device; to read them makes a GPU wait. ``state.figures`` has their means over
    all processes since the last reading, new only where ``state.log_due``.
    """

    def pre_train(self, state: TrainState) -> None:
        """Run once, before the first step of this process."""

    def pre_load(self, state: TrainState) -> None:
        """Run before a step's micro-batches are loaded."""

    def pre_step(self, state: TrainState) -> None:
        """Run when ``state.micro_batches`` are there, before their forward passes."""

    def post_step(self, state: TrainState) -> None:
        """Run after a step, made or left out; ``state.step`` counts it already."""

    def close(self, state: TrainState, error: BaseException | None) -> None:
        """Run once when training ends, by an error (Stopped after a signal) or none."""


class Callbacks:
    """Several callbacks, called in their order, and closed in the reverse one."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)

    @contextmanager
    def around(self, state: TrainState) -> Iterator[None]:
        """Within this block all callbacks are at work; each one that began is closed at its end."""
        with ExitStack() as stack:
            for callback in self.callbacks:
                callback.pre_train(state)
                stack.push(partial(_close, callback, state))
            yield

    def pre_load(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.pre_load(state)

    def pre_step(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.pre_step(state)

    def post_step(self, state: TrainState) -> None:
        for callback in self.callbacks:
            callback.post_step(state)


def _close(
    callback: Callback,
    state: TrainState,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
) -> None:
    callback.close(state, error)
