"""torchrun whose exit code is the ranks' own: python -m r2id.torchrun [torchrun's options] -m r2id.cli train CONFIG …

torchrun ends with 1 whatever its processes ended with, and gives them 30 seconds after a signal. Here a signal is passed on
to the ranks, which save and end by themselves, however long that takes; the exit code is that of the first rank that failed,
of those that r2id states (0 done, 1 failed, 2 wrong input, 75 stopped with everything saved), and 1 for any other.
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

_STATED = (0, 1, 2, 75)


def launch(arguments: Sequence[str]) -> int:
    """Start the ranks of this host and wait for them; the job's exit code."""
    received: list[int] = []
    codes: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        # A first Ctrl-C asks to save, as SIGTERM does; a second one interrupts at once.
        ranks = psutil.Process().children()
        if not ranks:
            sys.exit(75)
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):  # it has ended by itself
                rank.send_signal(
                    signal.SIGINT if received and number == signal.SIGINT else signal.SIGTERM
                )
        received.append(number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, pass_on)
    # In the main thread the agent would take over the signals, and end the ranks in its own way.
    agent = threading.Thread(target=lambda: codes.append(_run(arguments, received)), daemon=True)
    agent.start()
    agent.join()
    return codes[0] if codes else 1


def _run(arguments: Sequence[str], received: Sequence[int]) -> int:
    # The agent warns of the signals that it cannot have, and repeats in its own words what the ranks have said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        run(parse_args(list(arguments)))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        print(
            f"launcher: rank {rank} was the first to end, with exit code {failure.exitcode}",
            file=sys.stderr,
        )
        if received and failure.exitcode == -signal.SIGTERM:
            return 75  # it had not begun yet, or was done
        return failure.exitcode if failure.exitcode in _STATED else 1
    return 0


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
