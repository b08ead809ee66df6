"""The errors that users meet. The command line turns each into one line and an exit code."""


class InputError(ValueError):
    """The input or the arguments are wrong: names the thing, the value and what is allowed. Exit code 2."""


class WorkError(RuntimeError):
    """The input was accepted and the work failed all the same. Exit code 1."""


class NonFiniteError(WorkError):
    """A loss or gradient is not finite; raised before the update of ``step`` (from 0), so that no weight is spoilt."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """A signal asked the work to stop and everything is saved: the same command goes on. Exit code 75."""
