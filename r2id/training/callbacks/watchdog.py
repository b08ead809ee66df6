"""Ends a process that makes no progress, where it would hang for ever.

A rank may wait for another that is stuck, or for a disk or a store that does not answer.
"""

from __future__ import annotations

import faulthandler
import math
import time

from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState

_STDERR = 2  # by its number, whatever stands in for sys.stderr


class Watchdog(Callback):
    """End the process when ``train.stall_seconds`` pass within a step or within saving.

    The stacks of all its threads go to stderr, and it exits with 1: a launcher then ends the other
    ranks. The timer is a thread of the interpreter's own, which needs no lock of Python's and so
    also ends code that never gives it back.
    """

    def __init__(self) -> None:
        self.armed = -math.inf

    def pre_train(self, state: TrainState) -> None:
        self._arm(state)

    def pre_load(self, state: TrainState) -> None:
        self._arm(state)

    def post_step(self, state: TrainState) -> None:
        self._arm(state)

    def close(self, state: TrainState, error: BaseException | None) -> None:
        faulthandler.cancel_dump_traceback_later()

    def _arm(self, state: TrainState) -> None:
        """Start the timer anew, though not at every short step: each start makes a thread."""
        limit, now = state.config.train.stall_seconds, time.monotonic()
        if limit is not None and now - self.armed > min(1.0, limit / 10):
            faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
            self.armed = now
