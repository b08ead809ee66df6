"""Progress of long work on stderr: a bar in a terminal, else a line every few seconds.

A process may set the environment variable R2ID_PROGRESS to the name of a file for a process that it
starts, which then writes its progress there.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO, TypeVar

from r2id.errors import WorkError
from r2id.files import write_atomic

Item = TypeVar("Item")

FILE_VARIABLE = "R2ID_PROGRESS"
"""Environment variable that names the file to which progress is written too; see _File."""

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_WRITES = 1.0


def say(message: str) -> None:
    """Print a line on stderr, above the bar if one is shown."""
    print(message, file=sys.stderr, flush=True)


def discard_unwritten(stream: TextIO) -> None:
    """Drop what could not be written to a stream, and all that will be.

    Python would try again at its end, and print a traceback.
    """
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def duration(seconds: float) -> str:
    """Format seconds for people: 8s, 3m05s, 2h04m."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def counted(number: int, one: str, several: str = "") -> str:
    """Write a number with its noun: 1 image, 2 images."""
    return f"{number} {one if number == 1 else several or one + 's'}"


class Progress:
    """Counts items that are done, and shows the count inside its ``with`` block.

    ``total`` is how many there are, if that is known. ``start`` is how many earlier work had done.
    ``per_item`` scales the rate: with 64 images per step and ``unit="images"``, the rate is in
    images per second. ``rate_of`` says after the rate what it counts, where that is not plain.
    ``shown=False`` shows nothing, for all ranks but the first.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        start: int = 0,
        unit: str = "steps",
        per_item: int = 1,
        rate_of: str = "",
        shown: bool = True,
    ) -> None:
        self.title, self.total, self.unit, self.per_item = title, total, unit, per_item
        self.rate_of = rate_of and f" {rate_of}"
        self.start = self.done = start
        self.note = ""
        self._displays: list[_Bar | _Lines | _File] = []
        if shown:
            self._displays.append(_Bar(self) if sys.stderr.isatty() else _Lines(self))
            if file := os.environ.get(FILE_VARIABLE):
                self._displays.append(_File(self, Path(file)))

    def __enter__(self) -> Progress:
        self._began = time.monotonic()
        for display in self._displays:
            display.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for display in self._displays:
            display.close(complete=kind is None)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """Count more items; ``note`` replaces the text at the end of the line, say the loss."""
        self.done += count
        if note is not None:
            self.note = note
        for display in self._displays:
            display.update()

    @property
    def elapsed(self) -> float:
        """Seconds since the ``with`` block was entered."""
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Items per second since then; the ``start`` items of earlier work are not counted."""
        return (self.done - self.start) / max(self.elapsed, 1e-9)

    def status(self) -> str:
        """Format rate and remaining time, once something is done, and the note."""
        parts = []
        if self.done > self.start:
            parts.append(f"{self.rate * self.per_item:.4g} {self.unit}/s{self.rate_of}")
            if self.total and self.done < self.total:
                parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class _Lines:
    """Lines on stderr, for log files: how far the work is, every few seconds, and at its end."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def open(self) -> None:
        self.next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def update(self) -> None:
        if time.monotonic() >= self.next:
            self.open()
            self._print("")

    def close(self, complete: bool) -> None:
        progress = self.progress
        ending = "done" if complete else "stopped"
        self._print(f"{ending} in {duration(progress.elapsed)}")

    def _print(self, ending: str) -> None:
        progress = self.progress
        total = f"/{progress.total}" if progress.total is not None else ""
        parts = (f"{progress.title}: {progress.done}{total}", ending, progress.status())
        say(", ".join(filter(None, parts)))


class _Bar:
    """A bar at the bottom of a terminal."""

    def __init__(self, progress: Progress) -> None:
        # Imported only here, because most processes write to a file and need none of it.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.progress = progress
        self.rich = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[status]}"),
            console=Console(stderr=True),
        )

    def open(self) -> None:
        progress = self.progress
        self.task = self.rich.add_task(
            progress.title, total=progress.total, completed=progress.done, status=""
        )
        self.rich.start()

    def update(self) -> None:
        self.rich.update(self.task, completed=self.progress.done, status=self.progress.status())

    def close(self, complete: bool) -> None:
        self.update()
        self.rich.stop()


class _File:
    """A file with one JSON object: title, done, total (null if unknown) and status, a text.

    It is replaced as a whole, so that readers always find a complete one.
    """

    def __init__(self, progress: Progress, path: Path) -> None:
        self.progress, self.path = progress, path

    def open(self) -> None:
        self.next = 0.0
        self._write()

    def update(self) -> None:
        if time.monotonic() >= self.next:
            self.next = time.monotonic() + _SECONDS_BETWEEN_WRITES
            self._write()

    def close(self, complete: bool) -> None:
        self._write()

    def _write(self) -> None:
        progress = self.progress
        state = {
            "title": progress.title,
            "done": progress.done,
            "total": progress.total,
            "status": progress.status(),
        }
        with suppress(WorkError):  # work goes on even if its progress cannot be written
            write_atomic(self.path, json.dumps(state).encode(), durable=False)


def track(items: Collection[Item], title: str, *, unit: str = "items") -> Iterator[Item]:
    """Yield the same items, and show how many of them are done."""
    with Progress(title, len(items), unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
