"""The callback interface of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType

from r2id.progress import say
from r2id.training.state import TrainState


class Callback:
    """Something that a run does beside training. Each method does nothing unless overridden.

    Every process calls every method. So collective operations are allowed, and work for one process
    only must ask ``dist.is_main()``. Callbacks keep no state that a resumed run needs. A resumed
    run goes on from ``state.start``: a file that grows with the steps may already hold later ones,
    from a process that was killed, and these steps are made again.

    ``state.results`` has the losses of the last step for each micro-batch, of this process only and
    on its device; reading them makes the host wait for a GPU. ``state.figures`` has their means
    over all processes since the last reading, and is new only where ``state.log_due``.
    """

    def pre_train(self, state: TrainState) -> None:
        """Run once, before the first step of this process."""

    def pre_load(self, state: TrainState) -> None:
        """Run before a step's micro-batches are loaded."""

    def pre_step(self, state: TrainState) -> None:
        """Run when ``state.micro_batches`` are loaded, before their forward passes."""

    def post_step(self, state: TrainState) -> None:
        """Run after a step, made or skipped; ``state.step`` counts it already."""

    def close(self, state: TrainState, error: BaseException | None) -> None:
        """Run once when training ends, with the error that ended it if any (Stopped: a signal)."""


class Callbacks:
    """Several callbacks, called in order and closed in reverse order."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.callbacks = list(callbacks)

    @contextmanager
    def around(self, state: TrainState) -> Iterator[None]:
        """Begin all callbacks; at the end of this block, close each one that has begun."""
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
    """Close a callback. What goes wrong then is only said when another error came before it."""
    try:
        callback.close(state, error)
    except Exception as further:
        if error is None:
            raise
        say(f"{type(callback).__name__}: {str(further) or type(further).__name__}")
