"""The ``r2id`` command: arguments to library calls, errors to one line and an exit code."""

from __future__ import annotations

import sys

from r2id.cli import checkpoints, data, training, use  # noqa: F401  (they register their commands)
from r2id.cli.options import app
from r2id.errors import InputError, Stopped, WorkError


def main() -> None:
    """Run the command in ``sys.argv``.

    Exit codes: 0 done, 1 the work failed, 2 the input or arguments are wrong, 75 stopped by a
    signal with everything saved.
    """
    try:
        app()
    except WorkError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(75)
