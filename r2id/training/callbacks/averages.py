"""Moving averages of the weights, which sampling uses instead of the weights themselves."""

from __future__ import annotations

from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState


class MovingAverages(Callback):
    """Move the averages towards the weights after every step that updated them.

    The averages themselves are kept in the engine, because each rank has those of its own masters
    only, and saves and loads them together.
    """

    def post_step(self, state: TrainState) -> None:
        if state.updated:
            state.engine.ema.update(state.step - 1)  # ``state.step`` counts the step already
