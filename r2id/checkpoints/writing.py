"""Writing checkpoints: every rank writes its share, and the folder is either complete or absent.

A folder is written under a temporary name, flushed to disk, and then renamed. So a checkpoint that
exists is complete, whatever interrupts the writing.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from r2id import dist
from r2id.checkpoints.files import (
    CODEC,
    LATEST,
    FileFact,
    Meta,
    write_description,
    write_part,
    write_whole,
)
from r2id.checkpoints.reading import Checkpoint, list_checkpoints
from r2id.checkpoints.state import EngineState, Slices, Tensors, whole
from r2id.errors import InputError, WorkError
from r2id.files import fsync, step_of, sweep, write_atomic

_TEMPORARY = ".tmp-"

T = TypeVar("T")


def save(
    run_dir: Path,
    state: EngineState,
    meta: Meta,
    *,
    keep: int,
    stats: Tensors | None = None,
    codec: bytes | None = None,
) -> Path:
    """Write a checkpoint of a run, then remove all others but the newest ``keep`` and milestones.

    Every rank calls it with its share of the state; ``stats``, and the ``codec`` of an R2ID as an
    exported model, are taken from rank 0 alone. Returns the folder. Raises WorkError on every rank
    when the disk is full or fails for one of them; older checkpoints then stay as they were.
    """
    root = run_dir / "checkpoints"
    parts = state.parts | ({"stats": whole(stats)} if stats and dist.is_main() else {})
    folder = _write(root, parts, state.step, meta, codec)

    def remove_old() -> None:
        _point_latest_to(folder)
        for old in list_checkpoints(root)[:-keep]:
            if not _is_milestone(old):
                _remove(old)

    _on_main(folder, remove_old)
    return folder


def save_snapshot(run_dir: Path, state: EngineState, meta: Meta) -> Path:
    """Write the averages only, to RUN/ema, where they stay; otherwise like ``save``."""
    averages = {kind: slices for kind, slices in state.parts.items() if kind.split("-")[0] == "ema"}
    return _write(run_dir / "ema", averages, state.step, meta)


def tidy(run_dir: Path, start: int) -> None:
    """Prepare a run directory for training from step ``start`` on. Only one process calls it.

    Removes the remains of interrupted saves, and snapshots of later steps, which the run is about
    to make again. Has ``latest`` name the newest checkpoint, in case that was removed by hand.
    Raises WorkError when the disk fails.
    """
    try:
        for root in (run_dir / "checkpoints", run_dir / "ema"):
            _sweep(root)
        for snapshot in list_checkpoints(run_dir / "ema"):
            if step_of(snapshot) > start:
                _remove(snapshot)
        folders = list_checkpoints(run_dir / "checkpoints")
        pointer = run_dir / "checkpoints" / LATEST
        named = pointer.read_text(encoding="utf-8") if pointer.is_file() else None
        if folders and named != f"{folders[-1].name}\n":
            _point_latest_to(folders[-1])
    except OSError as error:
        raise WorkError(f"{run_dir}: {error}") from error


def _write(
    root: Path, parts: dict[str, Slices], step: int, meta: Meta, codec: bytes | None = None
) -> Path:
    """Write a new checkpoint folder, complete or absent; every rank writes its parts."""
    if step != meta.step:
        raise ValueError(f"state of step {step}, meta of step {meta.step}")
    folder = root / f"step-{meta.step:08d}"
    temporary = root / f"{_TEMPORARY}{folder.name}"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary.mkdir()

    def write() -> dict[str, FileFact]:
        files: dict[str, FileFact] = {}
        for kind, slices in parts.items():
            files |= write_part(temporary, kind, slices, dist.rank(), dist.world_size())
        if codec is not None and dist.is_main():
            files |= write_whole(temporary, CODEC, codec)
        return files

    try:
        _on_main(folder, begin)
        files = {name: fact for written in _on_all(folder, write) for name, fact in written.items()}
        _on_main(folder, lambda: _commit(temporary, folder, meta, files))
    except WorkError:
        if dist.is_main():  # the disk may be full, and this is of no use
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _commit(temporary: Path, folder: Path, meta: Meta, files: dict[str, FileFact]) -> None:
    """Check what all ranks wrote, describe it, and rename the folder into place."""
    for name, fact in files.items():
        if (temporary / name).stat().st_size != fact.bytes:
            raise OSError(f"{name} is not whole")
    write_description(temporary, meta, files)
    Checkpoint(temporary)  # raises InputError when an element of a tensor is missing
    if folder.exists():  # of a run that went back to an earlier step
        _remove(folder)
    temporary.rename(folder)
    fsync(folder.parent)


def _on_all(folder: Path, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank, and return the results of all ranks on each of them.

    Raises WorkError on all ranks when it fails on one. If that one alone stopped, the others would
    wait for it for ever.
    """
    try:
        mine: tuple[T | None, str | None] = work(), None
    except (OSError, SafetensorError, InputError, WorkError) as error:
        mine = None, str(error)
    results = dist.gather_objects(mine)
    failure = next((reason for _, reason in results if reason is not None), None)
    if failure is not None:
        raise WorkError(
            f"{folder}: not written: {failure}; older checkpoints are as they were, and the same "
            "command goes on from the newest"
        )
    return [result for result, _ in results]


def _on_main(folder: Path, work: Callable[[], None]) -> None:
    """Run ``work`` on rank 0 only; raises errors like _on_all."""
    _on_all(folder, work if dist.is_main() else lambda: None)


def _is_milestone(folder: Path) -> bool:
    """Tell whether the run that wrote a checkpoint wanted it kept, whatever it wants now."""
    try:
        every = Checkpoint(folder).meta.config["train"].get("milestone_every")
    except InputError:  # damaged
        return False
    return bool(every) and step_of(folder) % every == 0


def _point_latest_to(folder: Path) -> None:
    """Have ``latest`` name this checkpoint."""
    write_atomic(folder.parent / LATEST, f"{folder.name}\n".encode())


def _remove(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that no half of one keeps its name."""
    doomed = folder.rename(folder.parent / f"{_TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed)


def _sweep(root: Path) -> None:
    """Remove the remains of interrupted saves."""
    for path in root.glob(f"{_TEMPORARY}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    sweep(root)
