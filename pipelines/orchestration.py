"""Set up Prefect so that a flow runs out of the box and leaves no process behind."""

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

from pipelines.subprocesses import end_with_us
from r2id.errors import Stopped, WorkError
from r2id.progress import say

_RESTARTS = 5  # of a server that died
# A start takes seconds, on an overloaded machine minutes. A server that dies is noticed at once.
_START_SECONDS = 600.0
_SILENT_SECONDS = 10.0  # after which it is said what is waited for


@contextlib.contextmanager
def prefect_ready() -> Iterator[None]:
    """Provide a server for the flows in this block: that of PREFECT_API_URL, or one of its own.

    Within the block SIGTERM and SIGINT raise Stopped, so that the process cleans up before it ends.
    Raises WorkError when Prefect's client gives up.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    with _signals_raise(), _messages_end(), _client_errors():
        if PREFECT_API_URL.value():
            yield
            return
        _keep_from_proxies()
        # The address goes into the environment for all threads and child processes: one that did
        # not know it would start a server of its own, which nobody ends.
        server = _Server()
        os.environ["PREFECT_API_URL"] = server.address
        refresh_global_settings_context()
        try:
            yield
        finally:
            server.closing = True
            del os.environ["PREFECT_API_URL"]


def is_prefect_error(error: BaseException) -> bool:
    """Return whether an error comes from Prefect or the connection to it, not from the work."""
    from httpx import HTTPError
    from prefect.exceptions import PrefectException

    return isinstance(error, HTTPError | PrefectException) or "Failed to reach API" in str(error)


def server_answers(within: float = 0.0) -> bool:
    """Return whether the server of the flows answers now, or within this many seconds."""
    from prefect.settings import PREFECT_API_URL

    address, end = PREFECT_API_URL.value(), time.monotonic() + within
    while not (address and _answers(f"{address}/health")):
        if time.monotonic() >= end:
            return False
        time.sleep(0.5)
    return True


def describe_error(error: BaseException) -> str:
    """Describe another library's error in one line."""
    return " ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def _keep_from_proxies() -> None:
    """Have this process and its children reach this machine directly, also under http_proxy.

    A proxy's 127.0.0.1 is another machine. Programs read one of the two names, some the first that
    is set.
    """
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    if excepted != "*":
        excepted = ",".join(filter(None, [excepted, "127.0.0.1"]))
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = excepted


@contextlib.contextmanager
def _client_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not is_prefect_error(error):
            raise
        raise WorkError(
            f"prefect: {describe_error(error)}: run the same command again to continue"
        ) from error


@contextlib.contextmanager
def _messages_end() -> Iterator[None]:
    """Drop undelivered messages of Prefect's client at the end of the block, if its server is gone.

    Otherwise the client would try ten times to deliver each one, a second apart, before the process
    can end, and there are some for every task. If none has ever started, there are none.
    """
    from prefect.settings import PREFECT_API_URL

    try:
        yield
    finally:
        if PREFECT_API_URL.value() and not server_answers():
            from prefect._internal.concurrency.services import (
                _active_services,  # there is no public way
            )

            say("prefect: its server does not answer: undelivered messages are lost")
            for service in list(_active_services):
                if service._loop is not None and service._task is not None:
                    service._loop.call_soon_threadsafe(service._task.cancel)


class _Server:
    """A Prefect server for this machine. It is started again when it dies: its records are on disk.

    Prefect would start one by itself, but in the process group of this process: a terminal's Ctrl-C
    or a scheduler's SIGTERM would end it before the stages have saved, and it would outlive a
    killed pipeline.
    """

    def __init__(self) -> None:
        from prefect.settings import PREFECT_HOME

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}/api"
        self.closing = False
        self.process = self._start()
        began, told = time.monotonic(), False
        while not _answers(f"{self.address}/health"):
            waited = time.monotonic() - began
            if self.process.poll() is not None or waited > _START_SECONDS:
                raise WorkError(
                    f"Prefect's server does not start (exit code {self.process.poll()}): is its "
                    f"folder writable, with room? PREFECT_HOME = {PREFECT_HOME.value()}"
                )
            if waited > _SILENT_SECONDS and not told:
                say("starting Prefect's server")
                told = True
            time.sleep(0.1)
        threading.Thread(target=self._keep, daemon=True, name="prefect-server").start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            sys.executable,
            "-m",
            "prefect",
            "server",
            "start",
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--no-ui",
            "--no-scheduler",
            "--no-late-runs",
            "--log-level",
            "ERROR",
        ]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
        )
        # It ends only after this process, which can therefore deliver its last messages.
        end_with_us(process.pid)
        return process

    def _keep(self) -> None:
        """Start the server again when it dies, some times at most."""
        for _ in range(_RESTARTS):
            self.process.wait()
            if self.closing:
                return
            say("prefect: its server has ended; starting it again")
            self.process = self._start()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except urllib.error.HTTPError as error:
        return error.code < 500  # one that wants a password is a server too
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise Stopped within the block."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(f"by {signal.Signals(number).name}")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
