"""End worker processes with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import threading


def exit_with_parent() -> None:
    """Make this worker process exit as soon as its parent ends, even by SIGKILL.

    Call this when the worker starts. Without it, a worker that waits for work, whose pipe other
    workers hold open, or for a server that does not answer, would outlive its parent.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent").start()
