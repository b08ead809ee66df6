"""Ending a process that makes no progress, which would otherwise hang for ever.

It may wait for another rank that is stuck, or for a disk that does not answer.
"""

from __future__ import annotations

import faulthandler
import math
import time

from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState

_STDERR = 2  # its file descriptor, because sys.stderr may be replaced by something without one


class Watchdog(Callback):
    """End the process when ``train.stall_seconds`` pass within a step or within saving.

    It prints the stacks of all threads to stderr and exits with 1; a launcher then ends the other
    ranks. The timer is faulthandler's own thread, which needs no GIL, so that it also ends code
    that never releases the GIL.
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
        if limit and now - self.armed > min(1.0, limit / 10):
            faulthandler.dump_traceback_later(limit, exit=True, file=_STDERR)
            self.armed = now
