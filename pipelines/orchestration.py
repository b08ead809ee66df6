"""Prefect, set up so that a flow runs out of the box and leaves no process behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

from pipelines.stages import ends_with_us
from r2id.errors import Stopped

_SERVER_SECONDS = 120  # on a busy machine, its first start creates a database


@contextlib.contextmanager
def prefect_ready() -> Iterator[None]:
    """Within this block flows can run: on the server of PREFECT_API_URL, or on one that lives as long as the block.

    SIGTERM and SIGINT raise Stopped, so that a temporary server is ended like everything else.
    """
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL

    with _signals_raise():
        if PREFECT_API_URL.value():
            yield
            return
        server = SubprocessASGIServer()
        try:
            server.start(timeout=_SERVER_SECONDS)
            assert server.server_process is not None
            with ends_with_us(server.server_process.pid):
                yield
        finally:
            server.stop()


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
