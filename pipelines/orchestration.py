"""Prefect, set up so that a flow runs out of the box and leaves no process behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from pipelines.stages import end_with_us
from r2id.errors import Stopped

_SERVER_SECONDS = 120  # on a busy machine, its first start creates a database


@contextlib.contextmanager
def prefect_ready() -> Iterator[None]:
    """Within this block flows can run: on the server of PREFECT_API_URL, or on one that lives as long as this process.

    SIGTERM and SIGINT raise Stopped here, so that the process ends in order.
    """
    from prefect.settings import PREFECT_API_URL

    with _signals_raise():
        if not PREFECT_API_URL.value():
            _start_server()
        yield


def _start_server() -> None:
    """Prefect's temporary server, which Prefect itself ends at exit, after its last messages are delivered."""
    from prefect.server.api.server import SubprocessASGIServer

    server = SubprocessASGIServer()
    # The server inherits the blocked SIGINT, and so a terminal's Ctrl-C does not end it before the stages have saved.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        server.start(timeout=_SERVER_SECONDS)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    if server.server_process is not None:
        end_with_us(server.server_process.pid)


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    def stop(number: int, _frame: object) -> None:
        raise Stopped(f"by {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
