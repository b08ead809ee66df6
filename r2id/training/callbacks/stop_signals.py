"""Stopping at the end of a step, with everything saved, after SIGTERM, SIGINT or SIGHUP."""

from __future__ import annotations

import signal
import sys

import torch

from r2id import dist
from r2id.progress import discard_unwritten, say
from r2id.stop_signals import put_back, set_handler
from r2id.training.callbacks.base import Callback
from r2id.training.host_copy import HostCopy
from r2id.training.state import TrainState


class StopSignals(Callback):
    """Stop the run after the step in which a signal comes; a second SIGINT interrupts at once.

    After a signal in its last step, the run ends as it would without one.

    A signal may reach one rank alone, and all must stop at the same step. In a job of several
    processes they tell each other after every step, and read it one step later, when it is there
    without waiting: they stop after the step that follows the one in which the signal comes.
    """

    def __init__(self) -> None:
        self.received = False

    def pre_train(self, state: TrainState) -> None:
        self.poll = Poll(state.engine.device)
        self.before = set_handler(self._note)

    def post_step(self, state: TrainState) -> None:
        if dist.world_size() == 1:
            asked = self.received
        else:
            asked = self.poll.read()
            if not (asked or state.finished):
                self.poll.start(self.received)
        state.stopping = asked and not state.finished  # a run that is finished is not gone on with

    def close(self, state: TrainState, error: BaseException | None) -> None:
        put_back(self.before)

    def _note(self, number: int, _frame: object) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        again, self.received = self.received, True
        if again or not dist.is_main():
            return
        which = "this step" if dist.world_size() == 1 else "the next step"
        try:
            say(f"stopping at the end of {which}; everything will be saved")
        except OSError:  # as after SIGHUP from a terminal that was closed
            discard_unwritten(sys.stderr)


class Poll:
    """A question to all ranks, whose answer is read later: has any of them said yes?"""

    def __init__(self, device: torch.device) -> None:
        self.device, self.copy = device, HostCopy(device)
        self.wait: dist.Wait | None = None

    def start(self, yes: bool) -> None:
        """Tell the others this rank's answer. Every rank calls it at the same step."""
        self.answer = torch.full((), float(yes), device=self.device)
        self.wait = dist.start_all_reduce_max(self.answer)
        if self.device.type == "cuda":  # it is the GPU that waits there, and not the host
            self.wait()
            self.copy.start(self.answer)

    def read(self) -> bool:
        """Return whether any rank has said yes when it was last told; false if it never was."""
        wait, self.wait = self.wait, None
        if wait is None:
            return False
        if self.device.type == "cuda":
            return bool(self.copy.read())
        wait()
        return bool(self.answer)
