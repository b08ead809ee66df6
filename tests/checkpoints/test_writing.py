"""Saves that fail are told, and leave the older checkpoint as the newest."""

from __future__ import annotations

from pathlib import Path

import pytest

from r2id.checkpoints import Checkpoint, reading, writing
from r2id.checkpoints.files import FileFact, Meta
from r2id.checkpoints.state import Slices
from r2id.errors import WorkError
from tests.training.children import save, state


def next_meta(older: Path) -> Meta:
    return Checkpoint.open(older).meta.model_copy(update={"step": 2})


def only_one_left(run: Path, older: Path) -> bool:
    names = {path.name for path in (run / "checkpoints").iterdir()}
    return names == {"latest", older.name} and not reading.find_damages(run)


def test_a_state_without_half_of_a_tensor(tmp_path: Path) -> None:
    """As of a rank whose partner wrote nothing."""
    older = save(tmp_path, 1)
    with pytest.raises(
        WorkError, match=r"step-00000002: not written: .*all of model layer\.weight"
    ):
        writing.save(tmp_path, state(2, rank=0, ranks=2), next_meta(older), keep=1)
    assert only_one_left(tmp_path, older)


def test_a_file_that_is_cut_after_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a disk that fails after it has told of success."""
    older, write_part = save(tmp_path, 1), writing.write_part

    def cut(folder: Path, kind: str, slices: Slices, rank: int, ranks: int) -> dict[str, FileFact]:
        facts = write_part(folder, kind, slices, rank, ranks)
        for name in facts:
            if kind == "ema":
                (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        return facts

    monkeypatch.setattr(writing, "write_part", cut)
    with pytest.raises(WorkError, match=r"step-00000002: .*ema\.safetensors is not whole"):
        writing.save(tmp_path, state(2), next_meta(older), keep=1)
    assert only_one_left(tmp_path, older)
