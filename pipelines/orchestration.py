"""Prefect, set up so that a flow runs out of the box and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from pipelines.stages import end_with_us
from r2id.errors import Stopped, WorkError

_START_SECONDS = 600.0  # some seconds, minutes on an overloaded machine; a server that died is noticed at once


@contextlib.contextmanager
def prefect_ready() -> Iterator[None]:
    """Within this block flows can run: on the server of PREFECT_API_URL, or on one that lives as long as this process.

    SIGTERM and SIGINT raise Stopped here, so that the process ends in order.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    with _signals_raise():
        if PREFECT_API_URL.value():
            yield
            return
        # For the whole process and those it starts: a thread or worker that did not know the address would start a
        # server of its own, which nobody ends.
        os.environ["PREFECT_API_URL"] = _start_server()
        refresh_global_settings_context()
        try:
            yield
        finally:
            del os.environ["PREFECT_API_URL"]


def _start_server() -> str:
    """Start a Prefect server on this machine alone; the address of its API.

    Prefect would start one by itself, in this process's group: a terminal's Ctrl-C or a scheduler's SIGTERM would then
    end it before the stages have saved, and it would outlive a pipeline that is killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port, "--no-ui",
               "--no-scheduler", "--no-late-runs", "--log-level", "ERROR"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    end_with_us(server.pid)  # its only end: after this process has delivered its last messages
    address = f"http://127.0.0.1:{port}/api"
    deadline = time.monotonic() + _START_SECONDS
    while not _answers(f"{address}/health"):
        if server.poll() is not None or time.monotonic() > deadline:
            raise WorkError(f"Prefect's server does not start ({' '.join(command[1:])})")
        time.sleep(0.1)
    return address


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


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
