"""The signals that ask a job to save and stop."""

from __future__ import annotations

import signal

STOP_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def stop_signals() -> set[signal.Signals]:
    """Return the signals that ask this process to save and stop; not SIGHUP under nohup."""
    hang_up_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return STOP_SIGNALS - ({signal.SIGHUP} if hang_up_ignored else set())
