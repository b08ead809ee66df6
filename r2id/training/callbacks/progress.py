"""Showing how far a run is, to a person or to the pipeline that started it."""

from __future__ import annotations

import math

from r2id import dist
from r2id.progress import Progress
from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState


class ProgressDisplay(Callback):
    """Show the steps done, images per second and the loss, on stderr of rank 0."""

    def pre_train(self, state: TrainState) -> None:
        train = state.config.train
        self.progress = Progress(
            f"train {state.config.stage}",
            train.steps,
            start=state.start,
            unit="images",
            per_item=train.batch,
            # The time left is an estimate by this rate, which falls at each of them.
            rate_of="with previews and saving",
            shown=dist.is_main(),
        )
        self.progress.__enter__()

    def post_step(self, state: TrainState) -> None:
        loss = state.figures.get("loss", math.nan)  # NaN when all steps were skipped
        self.progress.advance(note=f"loss {loss:.4f}" if state.log_due else None)

    def close(self, state: TrainState, error: BaseException | None) -> None:
        self.progress.__exit__(None if error is None else type(error), error, None)
