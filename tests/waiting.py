"""Waiting for what another process does, and a port of this machine."""

import contextlib
import random
import socket
import time
from collections.abc import Callable
from typing import Any


def wait_until(
    condition: Callable[[], Any],
    seconds: float = 120,
    *,
    alive: Any = None,
    said: Callable[[], object] = lambda: "",
    every: float = 0.02,
) -> Any:
    """Wait for a condition, and return what it returned.

    ``alive`` is the process that is to bring it about, of subprocess or multiprocessing: the test
    fails at once when that has ended before, with what ``said`` returns.
    """
    end = time.monotonic() + seconds
    while True:
        ended = alive is not None and has_ended(alive)  # before the condition: it may be its last
        if met := condition():
            return met
        assert not ended, f"the process has ended: {said()}"
        assert time.monotonic() < end, f"not within {seconds} seconds: {said()}"
        time.sleep(every)


def has_ended(process: Any) -> bool:
    poll = getattr(process, "poll", None)
    return poll() is not None if poll else not process.is_alive()


def free_port() -> int:
    """Return a port of this machine that nobody listens at.

    It is below those that the system itself gives to whoever asks for any, so that it is still free
    when it is used.
    """
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
