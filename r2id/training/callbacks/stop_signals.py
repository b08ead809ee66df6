"""Stopping at the end of a step, with everything saved, after SIGTERM or SIGINT."""

from __future__ import annotations

import signal

import torch

from r2id import dist
from r2id.progress import say
from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState


class StopSignals(Callback):
    """Stop the run after the step in which a signal comes; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = False

    def pre_train(self, state: TrainState) -> None:
        self.handlers = {  # those from before, to be put back at the end
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def post_step(self, state: TrainState) -> None:
        # A signal may reach one rank alone, and all must stop at the same step.
        stopping = self.received
        if dist.world_size() > 1:
            flag = torch.tensor(float(stopping), device=state.engine.device)
            stopping = bool(dist.all_reduce_max(flag))
        state.stopping = stopping

    def close(self, state: TrainState, error: BaseException | None) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True
        say("stopping at the end of this step; everything will be saved")
