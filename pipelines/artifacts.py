"""Show the progress of long work in Prefect; the work never waits for Prefect or fails with it."""

from __future__ import annotations

import base64
import contextlib
import json
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
)
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.runtime import task_run

from pipelines.orchestration import describe_error, server_answers
from r2id.config import R2idRun, RiaeRun
from r2id.errors import Stopped
from r2id.mlflow_pages import RUN_ID_FILE, read_run_ids, run_page, server_command
from r2id.progress import FILE_VARIABLE, say

_SECONDS_BETWEEN_UPDATES = 2.0
_SECONDS_TO_END = 10.0  # that the end of a training waits for an update under way


class LiveArtifact:
    """An artifact whose content is replaced as the work goes on: a percentage, or Markdown."""

    def __init__(self, name: str, create: Callable[[], Any]) -> None:
        self.name, self.next_update = name, 0.0
        self.artifact: UUID | None = None
        self.shown: float | str | None = None
        try:
            self.artifact = create()
        except Exception as error:
            say(f"prefect: no {name} is shown: {describe_error(error)}")

    def show(self, data: float | str, last: bool = False) -> None:
        """Replace the content, at most every few seconds; the ``last`` one is shown at once."""
        now = time.monotonic()
        if self.artifact is None or data == self.shown or (now < self.next_update and not last):
            return
        self.next_update = now + _SECONDS_BETWEEN_UPDATES
        if not server_answers():  # its client would retry for a minute and delay the work
            return
        try:
            get_client(sync_client=True).update_artifact(self.artifact, ArtifactUpdate(data=data))
            self.shown = data
        except Exception as error:
            self.artifact = None
            say(f"prefect: {self.name} is shown no more: {describe_error(error)}")


class TrainingArtifacts:
    """Two artifacts of a training run, updated by a thread within a ``with`` block.

    One shows the progress in percent, the other a page with the command, MLflow run, checkpoint and
    figures. Run the training with ``environment``, and set ``result`` to what it returns.
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
        """Return the page as Markdown."""
        newest = self._checkpoint()
        rows = {
            "State": self.state,
            "Starts": self.starts,
            "Progress": self._status(),
            "Checkpoint": f"`{newest}`" if newest else "none yet",
            "MLflow": mlflow_run(self.run.run) if self.run.tracking.enabled else "switched off",
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
        done, status = self._done()
        return f"step {done} of {self.run.train.steps}" + (f", {status}" if status else "")

    def _done(self) -> tuple[int, str]:
        """Return the number of finished steps, and a few words about the newest ones."""
        if "step" in self.result:
            return self.result["step"], ""
        with contextlib.suppress(OSError, ValueError):
            progress = json.loads(self.file.read_text(encoding="utf-8"))
            # The process also reports other work there, such as reading the data.
            if progress["title"] == self.title:
                return progress["done"], progress["status"]
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


def show_mlflow_run(address: str, command: str | None) -> None:
    """Show a link to the pipeline's MLflow run, and the command that starts MLflow's server."""
    first = f"First start MLflow's server: `{command}`" if command else None
    _show(
        "link",
        lambda: create_link_artifact(
            address, link_text="charts and pictures in MLflow", key="mlflow", description=first
        ),
    )


def show_pipeline(
    name: str, stages: Sequence[Mapping[str, str]], lines: Sequence[str], pictures: Sequence[Path]
) -> None:
    """Show the table of a pipeline's stages, and a page of its results with its pictures."""
    _show(
        "table",
        lambda: create_table_artifact(
            [dict(stage) for stage in stages], key="stages", description=f"The stages of {name}"
        ),
    )
    _show(
        "page",
        lambda: create_markdown_artifact(
            _page(name, lines, pictures),
            key="r2id",
            description=f"Results of {name}, and where they are",
        ),
    )


def _page(name: str, lines: Sequence[str], pictures: Sequence[Path]) -> str:
    parts = [f"### {name}", "\n".join(f"* {line}" for line in lines)]
    parts += [
        f"{path.stem}:\n\n![{path.stem}]({data_uri(path.read_bytes(), 'png')})" for path in pictures
    ]
    return "\n\n".join(parts)


def data_uri(picture: bytes, form: str) -> str:
    """Return a picture in a file format as an address, which a page can show by itself."""
    return f"data:image/{form};base64,{base64.b64encode(picture).decode()}"


def _show(what: str, create: Callable[[], object]) -> None:
    try:
        create()
    except Exception as error:
        say(f"prefect: no {what} is shown: {describe_error(error)}")


def printable(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Format a command for a shell in the current folder, with paths relative to it."""
    settings = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*settings, shlex.join(command)]).replace(f"{Path.cwd()}/", "")


def mlflow_run(folder: Path) -> str:
    """Return Markdown with a link to the MLflow run of a run directory, and what to start first."""
    run, experiment = read_run_ids(folder / RUN_ID_FILE)
    if not run:
        return "not reached yet"
    link, command = f"[{run}]({run_page(experiment, run)})", server_command()
    return f"`{command}`, then {link}" if command else link


def _read(file: Path) -> str | None:
    """Return the content of a small text file; None when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return None
