"""The signals that ask a job to save and stop, and who handles them."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

Handlers = dict[signal.Signals, Any]


def stop_signals() -> set[signal.Signals]:
    """Return the signals that ask this process to save and stop: those that it does not ignore.

    Under nohup it ignores SIGHUP, and in the background of a script SIGINT.
    """
    return {number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN}


def set_handler(handler: Callable[[int, FrameType | None], None]) -> Handlers:
    """Have a function handle these signals; return what ``put_back`` is to put back afterwards.

    Within ``left_at_a_signal``, that ends here: put back are the handlers from before it.
    """
    before = {number: signal.signal(number, handler) for number in stop_signals()}
    before |= _before_start
    _before_start.clear()
    return before


def put_back(handlers: Mapping[signal.Signals, Any]) -> None:
    """Put back the handlers that ``set_handler`` has returned."""
    for number, handler in handlers.items():
        signal.signal(number, handler)


@contextmanager
def left_at_a_signal() -> Iterator[None]:
    """Have a signal end the process with 75, until the block ends or ``set_handler`` is called.

    It is for what comes before the first step, where nothing is there to be saved. No error is
    raised for it, because importing torch or numpy would swallow that, or abort. A process that is
    one of several keeps its handlers: it may wait for the others within torch, where no handler
    written in Python runs, and r2id.torchrun makes its end 75.
    """
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        _before_start.update(set_handler(_leave))
    try:
        yield
    finally:
        put_back(_before_start)
        _before_start.clear()


_before_start: Handlers = {}


def _leave(_number: int, _frame: FrameType | None) -> None:
    with suppress(OSError):  # as after SIGHUP from a terminal that was closed
        os.write(2, b"stopped: before the first step; run the same command again\n")
    os._exit(75)
