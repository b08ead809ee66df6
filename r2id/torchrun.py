"""torchrun with the exit codes of r2id, and without a time limit for ranks that save.

    python -m r2id.torchrun [torchrun's options] -m r2id.cli train CONFIG …

The exit code is that of the first rank that failed, if it is one of r2id's (0 done, 1 failed,
2 wrong input, 75 stopped with everything saved), else 1. Signals are passed on to the ranks, which
save and end by themselves.

Plain torchrun ends with 1 whatever its ranks end with, and loses their exit codes after a signal by
raising an error of its own. It also kills ranks that are still saving 30 seconds after a signal.
PyTorch 2.13 has an option for that time (``--shutdown-timeout``), but the oldest supported version
has none, and it does not bring the exit codes back.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import parse_args, run

from r2id.stop_signals import stop_signals

_DONE, _FAILED, _WRONG_INPUT, _SAVED = 0, 1, 2, 75
_STATED = (_DONE, _FAILED, _WRONG_INPUT, _SAVED)


def launch(arguments: Sequence[str]) -> int:
    """Start the ranks of this host, wait for them and return the job's exit code.

    ``arguments`` are torchrun's. Call it once, in the main thread, because it handles signals.
    """
    received: list[int] = []
    codes: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            sys.exit(_SAVED)  # no rank has started, so nothing can be lost
        # A first Ctrl-C asks to save, as SIGTERM does; a second one interrupts at once.
        interrupt = bool(received) and number == signal.SIGINT
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has ended in the meantime
                rank.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)
        received.append(number)

    for number in stop_signals():
        signal.signal(number, pass_on)
    # In the main thread, torchrun would install its own signal handlers and kill the ranks.
    agent = threading.Thread(target=lambda: codes.append(_run(arguments, received)), daemon=True)
    agent.start()
    agent.join()
    return codes[0] if codes else _FAILED  # none: torchrun itself failed, and has said so


def _run(arguments: Sequence[str], received: Sequence[int]) -> int:
    # torchrun warns of signals that it cannot handle, and repeats the errors of the ranks.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"torchrun: rank {rank} was the first to end, with exit code {failure.exitcode}",
            file=sys.stderr,
        )
        if received and failure.exitcode == -signal.SIGTERM:
            return _SAVED  # the signal came before the rank handled signals, or after it was done
        return failure.exitcode if failure.exitcode in _STATED else _FAILED
    return _DONE


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
