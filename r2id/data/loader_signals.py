"""What the signals that stop a job do to loader processes: nothing of themselves.

A whole job may be sent one, by a terminal, timeout or systemd. The training process still needs
batches for the step that it ends, and then ends its loaders.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

from r2id.stop_signals import STOP_SIGNALS


@contextmanager
def signals_held() -> Iterator[None]:
    """Hold these signals back while loader processes are started in this block.

    They inherit that, so that none acts on a signal before ignore_stop_signals runs.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore_stop_signals() -> None:
    """Have a loader process ignore them, except a SIGTERM that its parent sends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_when_parent_says, daemon=True).start()
    else:  # others do not say who has sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def tells_of_killed_loader(error: Exception) -> bool:
    """Return whether an error, raised by torch's DataLoader, says that a loader process is gone."""
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker (pid")
    # The connection that its tensors were to come over; "Caught" is put before a dataset's own.
    return isinstance(error, ConnectionError | EOFError) and not str(error).startswith("Caught ")


def forget_killed_loaders() -> None:
    """Have torch raise no more errors for loader processes that are gone, once that was told.

    Its handler of SIGCHLD raises one in whatever code the process is in, cleaning up too.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _end_when_parent_says() -> None:
    """End this process at a SIGTERM of its parent, which sends one to loaders that are stuck."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
