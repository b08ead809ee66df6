"""Checkpoints: folders of safetensors and JSON, complete or absent, that any engine at any world size goes on from.

    RUN/checkpoints/step-00001000/checkpoint.json        what it is, and a hash of every file
                                 /model.safetensors      weights          float32, by the model's own names
                                 /ema.safetensors        their average (and ema-SIGMA.safetensors, where there are several)
                                 /optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME
                                 /stats.safetensors      RIAE only: mean and std of its latents
    RUN/checkpoints/latest                               name of the newest, for people and other programs
    RUN/ema/step-00000500/                               the averages alone, kept for reconstructing others

Many ranks write a file each, KIND-00001-of-00002.safetensors, with what of the tensors they hold. A folder is written under
a temporary name, flushed to disk and renamed, so that one that exists is whole. Nothing is pickled: reading a checkpoint
runs no code from it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from safetensors import SafetensorError
from torch import nn

from r2id import dist
from r2id.checkpoints.files import FileFact, Folder, Meta, write_document, write_part
from r2id.checkpoints.state import EngineState, Slices, Source, Tensors, whole
from r2id.errors import InputError, WorkError
from r2id.files import fsync, sweep, write_atomic

_TEMPORARY = ".tmp-"

T = TypeVar("T")


def save(
    run_dir: Path,
    state: EngineState,
    meta: Meta,
    *,
    keep: int,
    milestone_every: int | None = None,
    stats: Tensors | None = None,
) -> Path:
    """Write a checkpoint of a run, then remove all but the newest ``keep`` and the milestones; the folder written.

    Every rank calls it with its own share of the state; rank 0's ``stats`` count. Raises WorkError on every rank when the
    disk is full or fails for one; older checkpoints are then untouched.
    """
    root = run_dir / "checkpoints"
    parts = state.parts | ({"stats": whole(stats)} if stats and dist.is_main() else {})
    folder = _write(root, parts, state.step, meta)

    def settle() -> None:
        _point(root, folder)
        for old in complete(root)[:-keep]:
            if not milestone_every or step_of(old) % milestone_every:
                _remove(old)

    _on_main(folder, settle)
    return folder


def save_snapshot(run_dir: Path, state: EngineState, meta: Meta) -> Path:
    """Write the averages alone, to be kept for good; otherwise as ``save``."""
    averages = {kind: slices for kind, slices in state.parts.items() if kind.split("-")[0] == "ema"}
    return _write(run_dir / "ema", averages, state.step, meta)


def tidy(run_dir: Path, start: int) -> None:
    """Before a run goes on from step ``start``: remove what interrupted saves left and the averages of later steps, which
    are of another past; let ``latest`` name the newest checkpoint when someone has removed what it named.

    For one process. WorkError when the disk does not let that be done.
    """
    try:
        for root in (run_dir / "checkpoints", run_dir / "ema"):
            _sweep(root)
        for snapshot in complete(run_dir / "ema"):
            if step_of(snapshot) > start:
                _remove(snapshot)
        newest = latest(run_dir)
        pointer = run_dir / "checkpoints" / "latest"
        if newest and not (pointer.is_file() and pointer.read_text() == f"{newest.name}\n"):
            _point(newest.parent, newest)
    except OSError as error:
        raise WorkError(f"{run_dir}: {error}") from error


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run directory, if there is one."""
    found = complete(run_dir / "checkpoints")
    return found[-1] if found else None


def complete(root: Path) -> list[Path]:
    """Checkpoint folders in a folder, oldest first."""
    return sorted(
        folder for folder in root.glob("step-*") if (folder / "checkpoint.json").is_file()
    )


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def resolve(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the newest in a run or ``checkpoints`` directory.

    Raises InputError when there is none.
    """
    if (path / "checkpoint.json").is_file():
        return path
    found = complete(path / "checkpoints") or complete(path)
    if not found:
        raise InputError(
            f"{path}: no checkpoint here; must be a checkpoint folder or a run directory that holds one"
            if path.is_dir()
            else f"{path}: no such folder; must be a checkpoint or a run directory"
        )
    return found[-1]


def load_meta(path: Path) -> Meta:
    """What the checkpoint at a path is. InputError when it is none, is damaged or has another format version; it then
    names the one before it that is not."""
    with _or_the_one_before(resolve(path)) as folder:
        return Folder(folder).meta


def load_tensors(path: Path, kind: str) -> Tensors:
    """One kind of a checkpoint's tensors, their files checked against their hashes. InputError as of load_meta."""
    with _or_the_one_before(resolve(path)) as folder:
        opened = Folder(folder)
        opened.shapes(kind)
        _raise_first(opened.damages([kind]))
        return opened.tensors(kind)


class Resumable(Protocol):
    """What goes on from a checkpoint: an engine of training."""

    def check(self, source: Source) -> None:
        """InputError when a state is another model's, or of other averages."""

    def load(self, source: Source) -> None:
        """Take over a state that fits; each rank reads what it holds."""


def load_into(engine: Resumable, path: Path) -> None:
    """Let an engine go on from a checkpoint; every rank calls it, hashes some of the files and reads what it holds.

    InputError on all of them when it is damaged or another model's; see load_meta.
    """
    with _or_the_one_before(resolve(path), engine.check) as folder:
        opened = Folder(folder)
        try:
            engine.check(opened)
        except InputError as error:
            raise InputError(f"{folder}: {error}") from None
        shared = dist.gather_objects(opened.damages(rank=dist.rank(), ranks=dist.world_size()))
        _raise_first(sorted(damage for damages in shared for damage in damages))
        engine.load(opened)


def fit(model: nn.Module, tensors: Tensors, path: Path) -> None:
    """Load the averaged weights of a checkpoint at ``path`` into a model, all of them. InputError when they are another
    model's."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def check(opened: Folder) -> None:
        if opened.shapes("ema") != expected:
            raise InputError(f"{opened.path}: its weights do not fit the model")

    with _or_the_one_before(path, check):
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{path}: its weights do not fit the model: {reason}") from None


def damages(path: Path) -> list[str]:
    """All that is wrong with the checkpoint at a path; none when every byte is as it was saved."""
    folder = resolve(path)
    try:
        return Folder(folder).damages()
    except InputError as error:
        return [str(error)]


def identity(path: Path) -> str:
    """Identity of a checkpoint: sha256 of its description, which holds the hashes of all files."""
    return hashlib.sha256((resolve(path) / "checkpoint.json").read_bytes()).hexdigest()


@contextmanager
def _or_the_one_before(
    folder: Path, check: Callable[[Folder], None] | None = None
) -> Iterator[Path]:
    """Name the newest intact checkpoint before a folder (that passes a check) in the InputError that tells what is
    wrong with it."""
    try:
        yield folder
    except InputError as error:
        older = next(
            (
                older
                for older in reversed(complete(folder.parent))
                if older.name < folder.name and _intact(older, check)
            ),
            None,
        )
        offer = (
            f"{older} is intact: name that one, or remove {folder} to go on from it"
            if older
            else ("there is no intact one before it")
        )
        raise InputError(f"{error}; {offer}") from None


def _intact(folder: Path, check: Callable[[Folder], None] | None) -> bool:
    try:
        if check:
            check(Folder(folder))
    except InputError:
        return False
    return not damages(folder)


def _raise_first(damages: list[str]) -> None:
    if damages:
        raise InputError(damages[0])


def _write(root: Path, parts: dict[str, Slices], step: int, meta: Meta) -> Path:
    """A new checkpoint folder, written by all ranks in parts; complete or absent."""
    if step != meta.step:
        raise ValueError(f"state of step {step}, meta of step {meta.step}")
    folder = root / f"step-{meta.step:08d}"
    temporary = root / f"{_TEMPORARY}{folder.name}"

    def begin() -> None:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary.mkdir()

    def write() -> dict[str, FileFact]:
        return {
            name: fact
            for kind, slices in parts.items()
            for name, fact in write_part(
                temporary, kind, slices, dist.rank(), dist.world_size()
            ).items()
        }

    def commit() -> None:
        lost = next(
            (
                name
                for name, fact in files.items()
                if (temporary / name).stat().st_size != fact.bytes
            ),
            None,
        )
        if lost:
            raise OSError(f"{lost} is not whole")
        write_document(temporary, meta, files)
        Folder(temporary)  # every element of every tensor is there
        _replace(temporary, folder)

    try:
        _on_main(folder, begin)
        files = {name: fact for written in _on_all(folder, write) for name, fact in written.items()}
        _on_main(folder, commit)
    except WorkError:
        if dist.is_main():  # what is left takes up a full disk
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _on_all(folder: Path, work: Callable[[], T]) -> list[T]:
    """What ``work`` returns on each rank, on every rank; WorkError on all of them when it fails on one."""
    try:
        mine: tuple[T | None, str | None] = work(), None
    except (OSError, SafetensorError, InputError, WorkError) as error:
        mine = None, str(error)
    results = dist.gather_objects(mine)
    failure = next((reason for _, reason in results if reason is not None), None)
    if failure is not None:
        raise WorkError(
            f"{folder}: not written: {failure}; older checkpoints are as they were, and the same command goes "
            "on from the newest"
        )
    return [result for result, _ in results]


def _on_main(folder: Path, work: Callable[[], None]) -> None:
    """The same of work for rank 0 alone."""
    _on_all(folder, work if dist.is_main() else lambda: None)


def _replace(temporary: Path, folder: Path) -> None:
    """Rename the finished folder into place; one of the same step, from a run that was set back, gives way."""
    if folder.exists():
        _remove(folder)
    temporary.rename(folder)
    fsync(folder.parent)


def _point(root: Path, folder: Path) -> None:
    """``latest`` names the folder, from one moment to the next."""
    write_atomic(root / "latest", f"{folder.name}\n".encode())


def _remove(folder: Path) -> None:
    """Remove a checkpoint so that, when interrupted, none is left half removed under its name."""
    doomed = folder.rename(folder.parent / f"{_TEMPORARY}old-{folder.name}")
    shutil.rmtree(doomed)


def _sweep(root: Path) -> None:
    """Remove what an interrupted save left."""
    for left in root.glob(f"{_TEMPORARY}*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    sweep(root)
