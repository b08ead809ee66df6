"""Reading checkpoints: open one once, then ask it for its metadata and its tensors.

A checkpoint that is damaged or does not fit is refused. The error names the newest intact one
before it, so that users need not search for it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from r2id import dist
from r2id.checkpoints import pretrained
from r2id.checkpoints.files import CODEC, DESCRIPTION, LATEST, kind_of, read_description
from r2id.checkpoints.pretrained import Pretrained
from r2id.checkpoints.state import Shape, Source, Tensors
from r2id.errors import InputError
from r2id.files import sha256_file, step_folders


class Checkpoint:
    """An open checkpoint. Its tensors are read from disk when they are asked for."""

    path: Path
    """Its folder, as it was named."""
    identity: str
    """sha256 of ``checkpoint.json``, which holds the hashes of all other files."""

    def __init__(self, folder: Path) -> None:
        """Open a checkpoint folder. ``open`` takes run directories too.

        Raises InputError when ``checkpoint.json`` is missing, damaged or of another format
        version, or when its files do not hold every element of its tensors exactly once.
        """
        description, self.identity = read_description(folder)
        self.path, self.meta, self.files = folder, description.meta(folder), description.files
        self._file = cache(self._open_file)
        self._shapes: dict[str, dict[str, Shape]] = {}
        self._places: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file, fact in self.files.items():
            for name, tensor in fact.tensors.items():
                shape = tuple(tensor.shape)
                self._shapes.setdefault(kind_of(file), {})[name] = shape
                first, count = tensor.part or (0, math.prod(shape))
                self._places.setdefault((kind_of(file), name), []).append((first, count, file))
        for (kind, name), places in self._places.items():
            self._check_places(kind, name, places)

    @classmethod
    def open(cls, source: Checkpoint | Path | str) -> Checkpoint:
        """Open a checkpoint folder, or the newest one of a run directory.

        A checkpoint that is open already is returned as it is, so that functions can take either.
        Raises InputError when there is none, and when the constructor does; the error then names
        the newest intact checkpoint before it.
        """
        if isinstance(source, Checkpoint):
            return source
        folder = find_checkpoint(Path(source))
        with _suggesting_an_older_one(folder):
            return cls(folder)

    @classmethod
    def open_newest(cls, run: Path) -> Checkpoint | None:
        """Open the newest checkpoint of a run directory; None when it has none yet."""
        folders = list_checkpoints(run / "checkpoints")
        return cls.open(folders[-1]) if folders else None

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.meta.step

    @property
    def run(self) -> Path:
        """The run directory that holds it."""
        path = self.path
        if len(path.parts) < 3 or ".." in path.parts[-2:]:  # its name does not tell its parents
            path = Path(os.path.abspath(path))  # noqa: PTH100 (resolve() would follow links)
        return path.parent.parent

    def kinds(self) -> list[str]:
        """Return the kinds of tensors that it holds: model, ema, optimizer…"""
        return list(self._shapes)

    def shapes(self, kind: str) -> dict[str, Shape]:
        """Return the shapes of a kind's tensors, by name. Raises InputError when it holds none."""
        if kind not in self._shapes:
            raise InputError(f"{self.path}: holds no {kind}.safetensors")
        return self._shapes[kind]

    def tensors(self, kind: str) -> Tensors:
        """Read a kind's tensors, after checking their files against their hashes.

        Raises InputError when there are none or a file is damaged; see ``open``.
        """
        with _suggesting_an_older_one(self.path):
            return self._verified(kind)

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> Tensor:
        """Read ``count`` elements (None: all the rest) of a flattened tensor from ``start`` on.

        Hashes are not checked; see ``tensors`` and ``damages``.
        """
        end = math.prod(self.shapes(kind)[name]) if count is None else start + count
        parts = []
        # Each file holds the elements first … first + held − 1; join those that were asked for.
        for first, held, file in self._places[kind, name]:
            begin, stop = max(start, first), min(end, first + held)
            if begin < stop or not held:  # nothing is held of a tensor without elements
                parts.append(self._elements(file, name, begin - first, stop - first))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def load_ema(self, model: nn.Module) -> None:
        """Load the averaged weights, checked against their hashes, into a model.

        Raises InputError when they are damaged or belong to another model; see ``open``.
        """
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}

        def check(checkpoint: Checkpoint) -> None:
            if checkpoint.shapes("ema") != expected:
                raise InputError(f"{checkpoint.path}: its weights do not fit the model")

        with _suggesting_an_older_one(self.path, check):
            try:
                model.float().load_state_dict(self._verified("ema"))
            except RuntimeError as error:
                reason = " ".join(str(error).split())
                raise InputError(
                    f"{self.path}: its weights do not fit the model: {reason}"
                ) from None

    def guide(self) -> Tensors | None:
        """Read the weights of an R2ID's guide; None when it has none."""
        return self.tensors("guide") if "guide" in self.kinds() else None

    def statistics(self) -> Tensors | None:
        """Read mean and std of an RIAE's latents, float32 [L]; None for any other checkpoint."""
        return self.tensors("stats") if "stats" in self.kinds() else None

    def codec(self) -> Checkpoint | Pretrained:
        """Open the RIAE that an R2ID was trained with: the one in its folder.

        Checkpoints of older versions only name it, by its place relative to the run directory.
        Raises InputError when it is damaged, or another than that.
        """
        named, identity = self.meta.model["codec"], self.meta.model["codec_hash"]
        if CODEC in self.files:
            with _suggesting_an_older_one(self.path):
                own = pretrained.read(self.path / CODEC, "riae")
                if own.identity != identity:
                    raise InputError(
                        f"{own.path}: not the RIAE that {self.path} was trained with ({named}, "
                        f"identity {identity[:12]})"
                    )
                return own
        # The run directory may be a link: from where it is, or from where it leads to.
        places = (Path(os.path.normpath(self.run / named)), self.run / named)
        found = [Checkpoint(place) for place in places if (place / DESCRIPTION).is_file()]
        for checkpoint in found:
            if checkpoint.identity == identity:
                return checkpoint
        state = "is not that one any more" if found else "is not there"
        raise InputError(
            f"{places[0]}: {self.path} was trained with the RIAE there (identity "
            f"{identity[:12]}), which {state}"
        )

    def damages(self, kinds: list[str] | None = None, rank: int = 0, ranks: int = 1) -> list[str]:
        """Rehash its files and list what is wrong, one sentence per file; empty when it is intact.

        ``kinds`` limits it to files of these kinds. Ranks share the work: each of ``ranks`` ranks
        checks other files.
        """
        damages = []
        for name in sorted(self.files)[rank::ranks]:
            if kinds is not None and kind_of(name) not in kinds:
                continue
            file, fact = self.path / name, self.files[name]
            try:
                size = file.stat().st_size
                if size != fact.bytes:
                    damages.append(
                        f"{file}: damaged: it has {size} bytes, and {fact.bytes} were saved"
                    )
                elif sha256_file(file) != fact.sha256:
                    damages.append(f"{file}: damaged: its bytes are not those that were saved")
            except OSError as error:
                damages.append(f"{file}: missing or unreadable: {error.strerror or error}")
        return damages

    def _verified(self, kind: str) -> Tensors:
        """Read a kind's tensors after checking the hashes of their files."""
        shapes = self.shapes(kind)
        _raise_first(self.damages([kind]))
        return {name: self.read(kind, name).view(shape) for name, shape in shapes.items()}

    def _check_places(self, kind: str, name: str, places: list[tuple[int, int, str]]) -> None:
        """Raise InputError unless a tensor's parts follow each other without gap or overlap."""
        places.sort()
        ends = [0, *(first + count for first, count, _ in places)]
        starts = [first for first, _, _ in places]
        if starts != ends[:-1] or ends[-1] != math.prod(self._shapes[kind][name]):
            raise InputError(
                f"{self.path}: damaged: its files do not hold all of {kind} {name}, "
                "or some of it twice"
            )

    def _elements(self, file: str, name: str, begin: int, stop: int) -> Tensor:
        """Read elements ``begin`` … ``stop`` − 1 of the part of a tensor in a file, flat."""
        try:
            stored = self._file(file).get_slice(name)
            shape = stored.get_shape()
            if not shape or not math.prod(shape):
                return self._file(file).get_tensor(name).reshape(-1)
            # safetensors reads whole rows: read only those that hold these elements.
            row = math.prod(shape[1:])
            top = begin // row
            return stored[top : -(-stop // row)].reshape(-1)[begin - top * row : stop - top * row]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.path / file}: missing or damaged: {error}") from None

    def _open_file(self, file: str) -> Any:
        return safe_open(self.path / file, framework="pt")


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint folder for a path: itself, or the newest one of a run directory.

    The path may also be a run's ``checkpoints`` folder, or the file ``latest`` in it. Raises
    InputError when there is none.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent
    if (path / DESCRIPTION).is_file():
        return path
    folders = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if folders:
        return folders[-1]
    if not path.is_dir():
        state = "is a file" if path.exists() else "no such folder"
        raise InputError(f"{path}: {state}; must be a checkpoint or a run directory")
    runs = sorted(run for run in path.iterdir() if list_checkpoints(run / "checkpoints"))
    hint = f", such as {' or '.join(map(str, runs))}" if runs else ""
    raise InputError(
        f"{path}: no checkpoint here; must be a checkpoint folder or a run directory that holds "
        f"one{hint}"
    )


def list_checkpoints(root: Path) -> list[Path]:
    """List the checkpoint folders in a folder, the oldest first."""
    return step_folders(root, DESCRIPTION)


def find_damages(path: Path) -> list[str]:
    """List what is wrong with the checkpoint at a path, one sentence per file."""
    folder = find_checkpoint(path)
    try:
        return Checkpoint(folder).damages()
    except InputError as error:
        return [str(error)]


def resume(
    source: Checkpoint | Path, check: Callable[[Source], None], load: Callable[[Source], None]
) -> None:
    """Resume from a checkpoint: ``load`` it, if its content passes ``check`` and is intact.

    Every rank calls it, and hashes its share of the files. Raises the InputErrors of ``check`` on
    all ranks, and InputError when the checkpoint is damaged; see Checkpoint.open.
    """
    checkpoint = Checkpoint.open(source)
    with _suggesting_an_older_one(checkpoint.path, check):
        try:
            check(checkpoint)
        except InputError as error:
            raise InputError(f"{checkpoint.path}: {error}") from None
        mine = checkpoint.damages(rank=dist.rank(), ranks=dist.world_size())
        _raise_first(sorted(damage for damages in dist.gather_objects(mine) for damage in damages))
        load(checkpoint)


@contextmanager
def _suggesting_an_older_one(
    folder: Path, check: Callable[[Checkpoint], None] | None = None
) -> Iterator[None]:
    """Within this block, extend InputErrors by the newest intact checkpoint before ``folder``.

    It has to pass ``check`` too. Without it, a user whose newest checkpoint is damaged would have
    to try the others in turn.
    """
    try:
        yield
    except InputError as error:
        older = next(
            (
                older
                for older in reversed(list_checkpoints(folder.parent))
                if older.name < folder.name and _is_intact(older, check)
            ),
            None,
        )
        offer = (
            f"{older} is intact: name that one, or remove {folder} to go on from it"
            if older
            else "there is no intact one before it"
        )
        raise InputError(f"{error}; {offer}") from None


def _is_intact(folder: Path, check: Callable[[Checkpoint], None] | None) -> bool:
    try:
        checkpoint = Checkpoint(folder)
        if check:
            check(checkpoint)
    except InputError:
        return False
    return not checkpoint.damages()


def _raise_first(damages: list[str]) -> None:
    if damages:
        raise InputError(damages[0])
