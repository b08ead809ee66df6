"""Ranks of the command leave their process group: together, or at once where one has failed."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import CONFIGS, TINY_RIAE
from tests.training import children
from tests.waiting import free_port


def run_ranks(folder: Path, digits: Path, ending: str, seconds: float) -> list[int | None]:
    """Exit codes of two ranks; None for one that has not ended in time."""
    port = free_port()
    arguments = [
        CONFIGS / "digits" / "riae.toml",
        *TINY_RIAE,
        f"run={folder}/run",
        f"data.shards={digits}",
        "train.steps=6",
        "tracking.enabled=false",
    ]
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                children.ended(
                    children.start(
                        children.train_as_rank, rank, 2, port, folder, ending, *arguments
                    )
                )
            )
            for rank in range(2)
        ]
        for rank in reversed(ranks):
            rank.join(seconds)
        return [rank.exitcode for rank in ranks]


def test_a_rank_that_fails_says_why_and_waits_for_nobody(digits: Path, tmp_path: Path) -> None:
    """With NCCL the others would wait for it in a collective, and it for them in leaving."""
    codes = run_ranks(tmp_path, digits, "failed", seconds=120)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert codes == [1, 1], said
    assert said[1].endswith("failed: this rank has no disk any more\n")
    assert "Traceback" in said[0] and "Traceback" not in said[1]
    assert not list(tmp_path.glob("left-*"))


@pytest.mark.parametrize(("ending", "code"), [("done", 0), ("stopped", 75)])
def test_ranks_that_end_together_leave_together(
    ending: str, code: int, digits: Path, tmp_path: Path
) -> None:
    codes = run_ranks(tmp_path, digits, ending, seconds=300)
    said = [(tmp_path / f"said-{rank}").read_text() for rank in range(2)]
    assert codes == [code, code], said
    assert sorted(path.name for path in tmp_path.glob("left-*")) == ["left-0", "left-1"]


def test_what_holds_for_all_ranks_is_said_by_the_first(digits: Path, tmp_path: Path) -> None:
    """That they stop, though each has got signals, that they have stopped, and go on."""
    for ending, code in (("stopped", 75), ("done", 0)):
        for path in (*tmp_path.glob("said-*"), *tmp_path.glob("left-*")):
            path.unlink()
        codes = run_ranks(tmp_path, digits, ending, seconds=300)
        first, second = ((tmp_path / f"said-{rank}").read_text() for rank in range(2))
        assert codes == [code, code], (first, second)
        words = ("stopping at", "stopped: ") if ending == "stopped" else ("going on from step",)
        assert [first.count(word) for word in words] == [1] * len(words), first
        assert not any(word in second for word in words), second
