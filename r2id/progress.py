"""One way to show progress, always on stderr: a bar when a person watches, plain lines every few seconds when not.

A process that starts another one names a file in R2ID_PROGRESS, and finds there how far that one is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from r2id.errors import WorkError
from r2id.files import write_atomic

Item = TypeVar("Item")

FILE_VARIABLE = "R2ID_PROGRESS"

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_BETWEEN_WRITES = 1.0


def say(message: str) -> None:
    """One line on stderr; above the bar when one is shown."""
    print(message, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as people read them: 8s, 3m05s, 2h04m."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class Progress:
    """Counts towards ``total`` (none: unknown), beginning at ``start`` when earlier work is being continued.

    ``per_item`` scales the rate shown: with 64 samples per step and ``unit="images"`` the rate reads images per second.
    ``shown=False`` counts in silence, for every rank but the first.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        start: int = 0,
        unit: str = "steps",
        per_item: int = 1,
        shown: bool = True,
    ) -> None:
        self.title, self.total, self.unit, self.per_item = title, total, unit, per_item
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for display in self._displays:
            display.close(complete=kind is None)

    def advance(self, count: int = 1, note: str | None = None) -> None:
        """``count`` more are done; ``note`` replaces the few words shown at the end (say, the loss)."""
        self.done += count
        if note is not None:
            self.note = note
        for display in self._displays:
            display.update()

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._began

    @property
    def rate(self) -> float:
        """Items per second since this process began; what an earlier one did is not counted."""
        return (self.done - self.start) / max(self.elapsed, 1e-9)

    def status(self) -> str:
        """Rate, remaining time and note, in words."""
        parts = [f"{self.rate * self.per_item:.4g} {self.unit}/s"]
        if self.total and self.done < self.total and self.rate > 0:
            parts.append(f"{duration((self.total - self.done) / self.rate)} left")
        if self.note:
            parts.append(self.note)
        return ", ".join(parts)


class _Lines:
    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def open(self) -> None:
        self.next = time.monotonic() + _SECONDS_BETWEEN_LINES

    def update(self) -> None:
        if time.monotonic() >= self.next:
            self.open()
            self._print(self.progress.status())

    def close(self, complete: bool) -> None:
        progress = self.progress
        ending = "done" if complete else "stopped"
        self._print(f"{ending} in {duration(progress.elapsed)}, {progress.status()}")

    def _print(self, text: str) -> None:
        progress = self.progress
        total = f"/{progress.total}" if progress.total is not None else ""
        say(f"{progress.title}: {progress.done}{total}, {text}")


class _Bar:
    def __init__(self, progress: Progress) -> None:
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
    """A JSON object: title, done, total (null: unknown) and status, which is words. Complete whenever it is read."""

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
        with suppress(WorkError):  # work goes on even where it cannot be shown
            write_atomic(self.path, json.dumps(state).encode(), durable=False)


def track(
    items: Iterable[Item], title: str, total: int | None = None, *, unit: str = "items"
) -> Iterator[Item]:
    """The same items, counted as they are used up."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Progress(title, total, unit=unit) as progress:
        for item in items:
            yield item
            progress.advance()
