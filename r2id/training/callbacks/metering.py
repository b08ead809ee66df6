"""Measuring a run: means of its losses, its rates, and where its time goes."""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.training.callbacks.base import Callback
from r2id.training.meter import Meter, matmul_peak
from r2id.training.state import TrainState


class Metering(Callback):
    """Update ``state.figures`` at every logged step, and its rates at the end of the run."""

    def pre_train(self, state: TrainState) -> None:
        device = state.engine.device
        dtype = torch.bfloat16 if state.config.train.autocast else torch.float32
        self.meter = Meter(device, state.task.cost, matmul_peak(device, dtype))

    def pre_load(self, state: TrainState) -> None:
        self.meter.lap("pause")  # the time that other callbacks took is not training time

    def pre_step(self, state: TrainState) -> None:
        self.meter.lap("data")

    def post_step(self, state: TrainState) -> None:
        kept = None
        if state.config.train.skip_nonfinite and isinstance(state.grad_norm, Tensor):
            # Whether this step is to be skipped may be known to the device alone.
            kept = torch.isfinite(state.grad_norm)
        for result in state.results:
            self.meter.add(*result, kept)
        self.meter.lap("step")
        if state.log_due:
            state.figures = self.meter.read()

    def close(self, state: TrainState, error: BaseException | None) -> None:
        if error is None:
            state.figures |= self.meter.summary()
