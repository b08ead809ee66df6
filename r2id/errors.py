"""The errors that users meet. The command line turns each into one line and an exit code."""

import errno

SYSTEM_FAULTS = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EIO,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)
"""Numbers of errors that tell of the system, not of the file in hand; they may pass."""

LOADER_KILLED = "a loader process was killed, perhaps for lack of memory: lower data.workers"


class InputError(ValueError):
    """The input or the arguments are wrong. Exit code 2.

    The message names the setting, file or argument, its value and what is allowed.
    """


class WorkError(RuntimeError):
    """The input is right, but the work failed, say because a disk is full. Exit code 1."""


class NonFiniteError(WorkError):
    """A loss or gradient is not finite. Exit code 1.

    Raised before the update of ``step`` (counted from 0), so that no weight is spoilt.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """A signal asked the work to stop, and everything is saved. Exit code 75 (EX_TEMPFAIL).

    The same command, given again, continues from there.
    """
