"""The ``r2id`` command: arguments to library calls, errors to one line and an exit code."""

from __future__ import annotations

import getpass
import io
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# They register their commands, in the order in which the help lists them.
# isort: off
from r2id.cli import data, settings, training, use, edit, checkpoints  # noqa: F401

# isort: on
from r2id.cli.options import app
from r2id.data.loader_signals import forget_killed_loaders, tells_of_killed_loader
from r2id.errors import LOADER_KILLED, InputError, Stopped, WorkError
from r2id.host_memory import keep_freed_memory
from r2id.openmp import limit_spinning
from r2id.progress import discard_unwritten, say


def main() -> None:
    """Run the command in ``sys.argv``.

    Exit codes: 0 done, 1 the work failed, 2 the input or arguments are wrong, 75 stopped by a
    signal with everything saved.
    """
    limit_spinning()  # first, because a command may load torch
    _ensure_account()
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: names of files, and signs that the terminal's encoding lacks, are escaped.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _run_command()
    except BaseException as error:
        _leave_job(error)
        raise


def _run_command() -> None:
    """Run the command; an error that is the user's to know becomes a line and SystemExit."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where an error becomes one line
    except (WorkError, OSError) as error:
        _fail(_describe(error))
    except RuntimeError as error:
        # torch raises this wherever the process happens to be, outside the loader too.
        if not tells_of_killed_loader(error):
            raise
        _fail(LOADER_KILLED)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(75)


def _leave_job(error: BaseException) -> None:
    """End this process at once with the error, if it is in a process group with others.

    NCCL's group is left together: to leave it would be to wait for the other processes, and they
    may wait in a collective for this one. Their launcher sees that it has ended, and ends them.
    """
    dist = sys.modules.get("r2id.dist")  # which not every command has loaded
    if dist is None:
        return
    if dist.world_size() == 1:
        dist.shutdown()
        return
    code: object = 1
    if isinstance(error, SystemExit):
        code = error.code or 0
    else:
        sys.excepthook(type(error), error, error.__traceback__)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code if isinstance(code, int) else 1)


def _ensure_account() -> None:
    """Set a home folder and a user's name where there are none, as for a container's bare user id.

    MLflow and Prefect ask for both, and could not even be imported.
    """
    name = f"user-{os.getuid()}"
    if os.path.expanduser("~") == "~":  # noqa: PTH111 (Path raises an error instead)
        home = Path(tempfile.gettempdir(), f"r2id-{name}")
        with suppress(OSError):
            home.mkdir(mode=0o700, exist_ok=True)
        if not home.is_dir() or home.stat().st_uid != os.getuid():  # made by somebody else
            home = Path(tempfile.mkdtemp(prefix="r2id-"))
        os.environ["HOME"] = str(home)
        say(f"no home folder: settings of libraries go to {os.environ['HOME']}")
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = name


def _fail(reason: str) -> NoReturn:
    if reason == LOADER_KILLED:
        forget_killed_loaders()
    print(f"failed: {reason}", file=sys.stderr)
    discard_unwritten(sys.stdout)
    sys.exit(1)


def _describe(error: Exception) -> str:
    """Describe an error; for one of the system's, the file that it is about and what is wrong."""
    if not isinstance(error, OSError):
        return str(error)
    files = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([*files, error.strerror or str(error) or type(error).__name__])
