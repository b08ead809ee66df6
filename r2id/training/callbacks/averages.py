"""Moving averages of the weights, which sampling uses instead of the weights themselves."""

from __future__ import annotations

from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState


class MovingAverages(Callback):
    """Move the averages towards the weights after each step that changed them.

    The averages themselves lie in the engine, beside the masters: each rank keeps those of its own
    share, and they are saved and loaded with it.
    """

    def post_step(self, state: TrainState) -> None:
        if state.updated:
            state.engine.ema.update(state.step - 1)
