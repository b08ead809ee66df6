"""Callbacks: what a training run does beside training, one file for each.

To add a callback, write a subclass of ``Callback`` in a file of its own and add it to ``REGISTRY``.
Every run has all callbacks. One that only some runs need asks for a setting in ``state.config``,
which may be a new field in r2id/config/training.py.
"""

from __future__ import annotations

from r2id.training.callbacks.averages import MovingAverages
from r2id.training.callbacks.base import Callback, Callbacks
from r2id.training.callbacks.checkpoints import Checkpoints
from r2id.training.callbacks.metering import Metering
from r2id.training.callbacks.previews import Previews
from r2id.training.callbacks.profiling import Profiling
from r2id.training.callbacks.progress import ProgressDisplay
from r2id.training.callbacks.snapshots import Snapshots
from r2id.training.callbacks.stop_signals import StopSignals
from r2id.training.callbacks.tracking import Tracking
from r2id.training.callbacks.watchdog import Watchdog

__all__ = ["REGISTRY", "Callback", "Callbacks", "make_callbacks"]

REGISTRY: tuple[type[Callback], ...] = (
    StopSignals,  # first, because the others ask whether this step is the last one
    MovingAverages,  # before the callbacks that save or show them
    Metering,  # before the callbacks that read its figures
    Tracking,
    ProgressDisplay,
    Watchdog,
    Snapshots,  # before the checkpoint, so that a resumed run lacks no earlier snapshot
    Checkpoints,
    Previews,  # after the checkpoint, which must not be lost when drawing fails
    Profiling,
)
"""All callbacks of a run, in the order in which they are called."""


def make_callbacks() -> Callbacks:
    """Make the callbacks of one run."""
    return Callbacks([callback() for callback in REGISTRY])
