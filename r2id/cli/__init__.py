"""The ``r2id`` command: arguments to library calls, errors to one line and an exit code."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TextIO

from r2id.cli import checkpoints, data, training, use  # noqa: F401  (they register their commands)
from r2id.cli.options import app
from r2id.errors import InputError, Stopped, WorkError


def main() -> None:
    """Run the command in ``sys.argv``.

    Exit codes: 0 done, 1 the work failed, 2 the input or arguments are wrong, 75 stopped by a
    signal with everything saved.
    """
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where an error becomes one line
    except (WorkError, OSError) as error:
        print(f"failed: {_describe(error)}", file=sys.stderr)
        _forget(sys.stdout)
        sys.exit(1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(75)


def _describe(error: Exception) -> str:
    """Describe an error; for one of the system's, the file that it is about and what is wrong."""
    if not isinstance(error, OSError):
        return str(error)
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*files, error.strerror or str(error) or type(error).__name__])


def _forget(stream: TextIO) -> None:
    """Drop what could not be written: Python would try again at its end, and print a traceback."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
