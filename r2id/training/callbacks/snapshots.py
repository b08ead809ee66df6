"""Copies of the moving averages, from which averages of other widths are made after training."""

from __future__ import annotations

from r2id.checkpoints import writing
from r2id.training.callbacks.base import Callback
from r2id.training.ema import snapshot_interval
from r2id.training.state import TrainState
from r2id.training.step import confirm_last_step


class Snapshots(Callback):
    """Save the averages of ``train.ema_profiles`` to RUN/ema, at intervals."""

    def post_step(self, state: TrainState) -> None:
        train = state.config.train
        if not train.ema_profiles:
            return
        if state.step % snapshot_interval(train) == 0:
            confirm_last_step(state)
            writing.save_snapshot(state.folder, state.engine.state(), state.meta())
