"""What a training run does beside training, one file for each thing.

To add a callback, write a subclass of ``Callback`` in a file of its own and add it to ``REGISTRY``.
Every run has all of them: one that is for some runs alone asks a setting in ``state.config``, which
may be a new field in r2id/config/training.py.
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
    StopSignals,  # first: what follows asks whether this is the last step
    MovingAverages,  # before all that saves or shows them
    Metering,  # before those who read its figures
    Tracking,
    ProgressDisplay,
    Watchdog,
    Snapshots,  # before the checkpoint, so that none lacks the snapshots of its past
    Checkpoints,
    Previews,  # after the checkpoint, which a picture that fails must not cost
    Profiling,
)
"""All callbacks of a run, in the order in which they are called after a step."""


def make_callbacks() -> Callbacks:
    """Make the callbacks of one run."""
    return Callbacks([callback() for callback in REGISTRY])
