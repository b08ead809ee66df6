"""What the flows show in Prefect of long work, which neither waits for this nor fails by it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import UUID

from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.runtime import task_run

from pipelines.orchestration import server_answers, words
from r2id.config import R2idRun, RiaeRun
from r2id.errors import Stopped
from r2id.progress import FILE_VARIABLE, say

_SECONDS_BETWEEN_UPDATES = 2.0
_SECONDS_TO_END = 10.0  # for an update that is under way
_MLFLOW = "http://127.0.0.1:5000"  # where its server is unless told otherwise


class LiveArtifact:
    """An artifact whose content is replaced as the work goes on: a percentage, or Markdown."""

    def __init__(self, what: str, create: Callable[[], Any]) -> None:
        self.what, self.next = what, 0.0
        self.artifact: UUID | None = None
        self.shown: float | str | None = None
        try:
            self.artifact = create()
        except Exception as error:
            say(f"prefect: no {what} is shown: {words(error)}")

    def show(self, data: float | str, last: bool = False) -> None:
        """Replace the content, every few seconds at most, or once more as the last one."""
        now = time.monotonic()
        if self.artifact is None or data == self.shown or (now < self.next and not last):
            return
        self.next = now + _SECONDS_BETWEEN_UPDATES
        if not server_answers():  # Prefect's client would try for a minute, and the work wait
            return
        try:
            get_client(sync_client=True).update_artifact(self.artifact, ArtifactUpdate(data=data))
            self.shown = data
        except Exception as error:
            self.artifact = None
            say(f"prefect: {self.what} is shown no more: {words(error)}")


class TrainingArtifacts:
    """Two artifacts of a training, kept up to date within a ``with`` block.

    They show how far it is, and a page with its command, MLflow run, checkpoint and figures. Run
    the training with ``environment``, and set ``result`` to what it returns.
    """

    def __init__(
        self, run: RiaeRun | R2idRun, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.run, self.title = run, f"train {run.stage}"
        self.command = printable(command, environment)
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "progress.json"
        self.environment = {**environment, FILE_VARIABLE: str(self.file)}
        self.result: dict[str, Any] = {}
        self.state, self.starts = "running", task_run.run_count
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True, name="artifacts")

    def __enter__(self) -> TrainingArtifacts:
        key, description = f"train-{self.run.stage}", str(self.run.run)
        self.progress = LiveArtifact(
            "progress",
            lambda: create_progress_artifact(0.0, key=f"{key}-progress", description=description),
        )
        self.page = LiveArtifact(
            "page",
            lambda: create_markdown_artifact(self.markdown(), key=key, description=description),
        )
        self.thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.state = (
            "done" if error is None else "stopped" if isinstance(error, Stopped) else "crashed"
        )
        if error is not None:
            self.state += f": {str(error) or type(error).__name__}"
        self.ended.set()
        self.thread.join(_SECONDS_TO_END)
        if not self.thread.is_alive():
            self._show(last=True)
        self.folder.cleanup()

    def markdown(self) -> str:
        """Write the page."""
        newest = self._checkpoint()
        rows = {
            "State": self.state,
            "Starts": self.starts,
            "Progress": self._status(),
            "Checkpoint": f"`{newest}`" if newest else "none yet",
            "MLflow": mlflow_run(_read(self.run.run / "mlflow-run-id"))
            if self.run.tracking.enabled
            else "switched off",
            **{
                name.replace("_", " "): f"{value:.6g}"
                for name, value in self.result.items()
                if isinstance(value, float)
            },
        }
        table = [
            f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in rows.items()
        ]
        return "\n".join(
            [
                f"### {self.title}",
                "",
                "```sh",
                self.command,
                "```",
                "",
                "| | |",
                "|---|---|",
                *table,
            ]
        )

    def _status(self) -> str:
        done, words = self._done()
        return f"step {done} of {self.run.train.steps}" + (f", {words}" if words else "")

    def _done(self) -> tuple[int, str]:
        """Steps that are done, and a few words about them."""
        if "step" in self.result:
            return self.result["step"], ""
        with contextlib.suppress(OSError, ValueError):
            told = json.loads(self.file.read_text())
            if told["title"] == self.title:  # and not of something else that the process does
                return told["done"], told["status"]
        newest = self._checkpoint()
        return (int(newest.name.rpartition("-")[2]) if newest else 0), ""

    def _checkpoint(self) -> Path | None:
        newest = _read(self.run.run / "checkpoints" / "latest")
        return self.run.run / "checkpoints" / newest if newest else None

    def _watch(self) -> None:
        while not self.ended.wait(1.0):
            self._show()

    def _show(self, last: bool = False) -> None:
        self.progress.show(min(100.0, 100 * self._done()[0] / self.run.train.steps), last)
        self.page.show(self.markdown(), last)


def printable(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Write a command for a shell in this folder, with paths relative to it."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)]).replace(f"{Path.cwd()}/", "")


def mlflow_run(run_id: str | None) -> str:
    """Where a run is in MLflow, as Markdown."""
    if not run_id:
        return "not reached yet"
    place = how_to_open_mlflow()
    if place.startswith("http"):
        return f"[{run_id}]({place}/#/runs/{run_id})"
    return f"`{place}`, then [{run_id}]({_MLFLOW}/#/runs/{run_id})"


def how_to_open_mlflow() -> str:
    """The address of MLflow's server without any password, or the command that starts a server."""
    store = os.environ.get("MLFLOW_TRACKING_URI", "")
    parts = urlsplit(store)
    if parts.scheme in ("http", "https"):
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
    script = Path("launch") / "mlflow.sh"
    if script.exists():
        return f"bash {script}"
    place = '"$MLFLOW_TRACKING_URI"' if store else "sqlite:///mlflow.db"
    return f"{printable([sys.executable], {})} -m mlflow server --backend-store-uri {place}"


def _read(file: Path) -> str | None:
    """A small text file, if it is there."""
    try:
        return file.read_text().strip()
    except OSError:
        return None
