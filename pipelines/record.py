"""pipeline.json in a pipeline's ``out``: its finished stages, and what MLflow has of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from r2id.errors import InputError
from r2id.files import write_atomic


class Record:
    """The record of a pipeline, written at every change.

    Its paths are relative to ``out``, so that they hold in a copy, and after a move. The MLflow run
    belongs to the place: a copy begins one of its own.
    """

    def __init__(self, out: Path) -> None:
        """Read it; raises InputError when the file is damaged."""
        self.out, self.file = out, out / "pipeline.json"
        place = str(out.resolve())
        empty = {"out": place, "mlflow_run": None, "mlflow_experiment": None}
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            content = {}
        except json.JSONDecodeError as error:
            raise InputError(
                f"{self.file}: damaged ({error}); remove it to begin a new record"
            ) from None
        if content.get("out", place) != place:
            content.update(empty)
        self.content: dict[str, Any] = {**empty, "stages": {}, "notes": {}, **content}

    @property
    def mlflow_run(self) -> str | None:
        """The id of the pipeline's run in MLflow, if it has one."""
        return self.content["mlflow_run"]

    @property
    def mlflow_experiment(self) -> str | None:
        """The id of that run's experiment."""
        return self.content["mlflow_experiment"]

    def set_mlflow_run(self, run: str, experiment: str) -> None:
        """Remember the pipeline's run in MLflow."""
        self.content.update(mlflow_run=run, mlflow_experiment=experiment)
        self._write()

    def find(self, stage: str, key: str) -> dict[str, Any] | None:
        """Return a stage's result if it was made with this key and its files are still there."""
        found = self.content["stages"].get(stage)
        if not found or found["key"] != key:
            return None
        result = found["result"]
        if "files" in result:
            result = {**result, "files": [str(self.out / file) for file in result["files"]]}
        made = [*result.get("files", ()), *(self.out / file for file in found.get("files", ()))]
        return result if all(Path(file).is_file() for file in made) else None

    def keep(
        self,
        stage: str,
        key: str,
        result: Mapping[str, Any],
        files: Sequence[Path],
        note: Mapping[str, Any],
    ) -> None:
        """Remember a finished stage: its result, its other files, and what ``note`` takes."""
        result = dict(result)
        if "files" in result:
            result["files"] = self._inside(result["files"])
        kept = {"key": key, "result": result, "files": self._inside(files)}
        self.content["stages"][stage] = kept
        self.note(stage, **note)

    def note(
        self,
        stage: str,
        params: Mapping[str, Any],
        times: tuple[float, float | None],
        folder: Path | None = None,
    ) -> None:
        """Remember that MLflow has to get a stage, which does not log there by itself.

        ``times`` are its start and end in seconds since 1970; the end is None until it is done.
        """
        self.content["notes"][stage] = {
            "params": params,
            "times": times,
            "folder": self._inside([folder])[0] if folder else None,
            "recorded_in": None,
        }
        self._write()

    def missing_in_mlflow(self) -> list[dict[str, Any]]:
        """Return the noted stages that the pipeline's run lacks, as end_pipeline takes them.

        It lacks all that were recorded in another run, which was deleted or is that of a copy.
        """
        stages = []
        for name, note in self.content["notes"].items():
            if note["recorded_in"] != self.mlflow_run:
                folder = self.out / note["folder"] if note["folder"] else None
                metrics = folder / "metrics.json" if folder else None
                stages.append(
                    {
                        "name": name,
                        "params": note["params"],
                        "times": note.get("times"),  # older records have none
                        "artifacts": [str(folder)] if folder else [],
                        "metrics": json.loads(metrics.read_text(encoding="utf-8"))
                        if metrics and metrics.is_file()
                        else {},
                    }
                )
        return stages

    def all_recorded(self) -> None:
        """Remember that the pipeline's run in MLflow has all noted stages."""
        for note in self.content["notes"].values():
            note["recorded_in"] = self.mlflow_run
        self._write()

    def _inside(self, files: Sequence[Path | str]) -> list[str]:
        return [os.path.relpath(file, self.out) for file in files]

    def _write(self) -> None:
        write_atomic(self.file, json.dumps(self.content, indent=2).encode())
