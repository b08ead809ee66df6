"""Ends a process that makes no progress, with the stacks of all its threads, where it would hang for ever: a rank that
waits for another that is stuck, a disk or a store that does not answer."""

from __future__ import annotations

import faulthandler
import time
from types import TracebackType


class Watchdog:
    """Within this block ``beat`` must be called at least every ``limit`` seconds (none: never ends anything).

    The stacks go to stderr and the process ends with 1: a launcher then ends the other ranks. The timer is a thread of the
    interpreter's own, which needs no lock of Python's and so also ends code that never gives it back.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self._armed = 0.0

    def __enter__(self) -> Watchdog:
        self.beat()
        return self

    def beat(self) -> None:
        now = time.monotonic()
        if self.limit is not None and now - self._armed > min(1.0, self.limit / 10):
            faulthandler.dump_traceback_later(
                self.limit, exit=True, file=2
            )  # stderr, whatever stands in for it
            self._armed = now

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        faulthandler.cancel_dump_traceback_later()
