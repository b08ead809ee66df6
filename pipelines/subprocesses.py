"""Run the stages of a pipeline as ``r2id`` commands, each in a process of its own.

This module starts them, passes their stderr on, forwards signals to them and turns their exit codes
into errors.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from r2id.errors import InputError, Stopped, WorkError

_TAIL = 4096  # characters of a stage's stderr that are kept to say why it failed


class StageCrashed(WorkError):
    """A stage ended without a result; ``got_further`` tells whether it saved a new checkpoint."""

    got_further = False


def run_stage(
    arguments: Sequence[str], *, processes: int = 1, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run ``r2id ARGUMENTS --json`` and return the object that it prints.

    Raises InputError (exit code 2), Stopped (75, or a signal that was passed on) or StageCrashed,
    each with the stage's last line.
    """
    code, output, tail = run_command(stage_command(arguments, processes), environment)
    if code == 0:
        return json.loads(output)
    line = _last_line(tail)
    if code == 2:
        raise InputError(f"{arguments[0]}: {line.removeprefix('error: ')}")
    if code == 75:
        said = line.removeprefix("stopped: ")
        raise Stopped(said if said != line else arguments[0])
    raise StageCrashed(
        f"{arguments[0]} ended with exit code {code}: {line.removeprefix('failed: ')}"
    )


def stage_command(arguments: Sequence[str], processes: int = 1) -> list[str]:
    """Return the command for ``r2id ARGUMENTS --json``; r2id.torchrun starts several processes."""
    launcher = ["-m", "r2id.torchrun", "--standalone", "--nproc-per-node", str(processes)]
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        "-m",
        "r2id.cli",
        *arguments,
        "--json",
    ]


def run_command(
    command: Sequence[str], environment: Mapping[str, str] | None = None
) -> tuple[int, str, str]:
    """Run a command, passing its stderr on as it comes.

    Returns its exit code (75 when a signal was passed on to it, which is for the caller too), its
    stdout and the end of its stderr.
    """
    with tempfile.TemporaryFile() as output, _stderr_for_child() as (reader, writer):
        # In a session of its own, a terminal's Ctrl-C reaches the child only by the handler below.
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=writer,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        os.close(writer)
        watcher = end_with_us(process.pid)
        with _signals_to(process) as passed_on:
            tail = _relay(reader)
            code = process.wait()
        watcher.kill()
        watcher.communicate()
        output.seek(0)
        return 75 if passed_on else code, output.read().decode(), tail


def end_with_us(pid: int) -> subprocess.Popen[bytes]:
    """Terminate a process when this one dies, even by SIGKILL.

    Returns the watcher process that does it; kill it once the other process has ended. Without a
    watcher, the stage of a killed pipeline would train on while the next pipeline writes to the
    same folder.
    """
    # When this process dies, its end of the pipe closes and the shell's ``read`` returns.
    return subprocess.Popen(
        ["sh", "-c", 'read _; kill "$0"', str(pid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


@contextlib.contextmanager
def _stderr_for_child() -> Iterator[tuple[int, int]]:
    """Open descriptors (read, write) for a child's stderr.

    They are a terminal where this process has one, so that the child draws its progress bars.
    """
    if sys.stderr.isatty():
        reader, writer = pty.openpty()
        with contextlib.suppress(OSError):
            size = shutil.get_terminal_size()
            termios.tcsetwinsize(writer, (size.lines, size.columns))
    else:
        reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)


@contextlib.contextmanager
def _signals_to(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass SIGINT and SIGTERM on to the child, which saves and ends.

    Yields the list of the signals that were passed on.
    """
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        process.send_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _relay(reader: int) -> str:
    """Copy the child's stderr to this process's, and return its end."""
    tail = ""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode  # a chunk may end in a sign
    while True:
        try:
            chunk = os.read(reader, 65536)
        except OSError:  # how a terminal reports that its other end is closed
            chunk = b""
        text = decode(chunk, final=not chunk)
        sys.stderr.write(text)
        sys.stderr.flush()
        tail = (tail + text)[-_TAIL:]
        if not chunk:
            return tail


def _last_line(tail: str) -> str:
    """Return the last line that says why a stage failed."""
    # Progress bars move the cursor with escape sequences and rewrite their line after a \r.
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", tail).replace("\r", "\n")
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    # r2id.torchrun ends by naming the rank that failed; the rank's own message comes before.
    lines = [line for line in lines if not line.startswith("torchrun: ")]
    return lines[-1] if lines else "no message"
