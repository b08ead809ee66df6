"""The ``r2id`` command: a thin layer from arguments to the library, with one-line errors and stated exit codes."""

from __future__ import annotations

import sys

from r2id.cli import checkpoints, data, training, use  # noqa: F401  (they register their commands)
from r2id.cli.options import app
from r2id.errors import InputError, Stopped, WorkError


def main() -> None:
    """Exit codes: 0 done, 1 the work failed, 2 wrong input or arguments, 75 stopped with everything saved."""
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
