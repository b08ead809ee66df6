"""The training loop in two processes with DeepSpeed, stopped by signals and spoilt by values that
are not finite.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.conftest import write_set
from tests.training import loop_ranks
from tests.training.children import Ranks
from tests.training.loop_ranks import STEPS, STOPS

APART = [stop for stop in STOPS if stop + 1 not in STOPS and stop + 1 < STEPS]
"""Steps that are not followed by another such, because a run goes on after the next one."""
SPOILS = [(stage, how) for stage in range(4) for how in loop_ranks.HOWS]


@pytest.mark.parametrize(
    ("stage", "stops"),
    [(2, APART[:2]), *(pytest.param(it, APART, marks=pytest.mark.slow) for it in range(4))],
)
def test_stopped_at_random_steps_by_a_signal_to_one_rank(
    stage: int, stops: list[int], ranks: Ranks, digits: Path, tmp_path: Path
) -> None:
    """Resumed as often as it was stopped, it equals the uninterrupted run bit for bit.

    The signal comes to rank 1 amid the accumulation: both stop at the end of the next step, when
    rank 0 knows of it, and a checkpoint holds whole steps only.
    """
    result = ranks(loop_ranks.ranks_stopped_at, stage, stops, digits, tmp_path)[0]
    assert result["differ"] == []
    ends = [stop + 1 for stop in stops]
    assert result["saved"] == [[step, step * 64] for step in [*ends, STEPS]]
    for step, said in zip(ends, result["said"], strict=True):
        assert f"step {step} of" in said


def test_a_signal_that_both_hear_of_at_the_last_step_stops_nothing(
    ranks: Ranks, digits: Path, tmp_path: Path
) -> None:
    said = ranks(loop_ranks.ranks_stopped, STEPS - 1, digits, tmp_path)
    assert said == ["not stopped"] * 2
    assert (tmp_path / "samples" / f"step-{STEPS:08d}.png").is_file()


@pytest.mark.parametrize(
    ("stage", "how"),
    [it if it == (2, "gradient") else pytest.param(*it, marks=pytest.mark.slow) for it in SPOILS],
)
def test_what_is_not_finite_on_one_rank_leaves_a_clean_checkpoint(
    stage: int, how: str, ranks: Ranks, digits: Path, tmp_path: Path
) -> None:
    """A loss, one rank's gradient, a parameter: the loop ends on both ranks before the update."""
    result = ranks(loop_ranks.ranks_spoilt, stage, how, digits, tmp_path)[0]
    assert all(f"step {loop_ranks.SPOILT}: " in said for said in result["said"]), result
    named = {"loss": "the loss", "gradient": "backward", "parameter": "decoder_blocks.0"}[how]
    assert named in result["said"][1]
    assert (result["step"], result["damages"], result["finite"]) == (loop_ranks.SAVED, [], True)


def test_images_of_a_stream_count_alike_where_ranks_have_different_numbers_of_them(
    ranks: Ranks, tmp_path: Path
) -> None:
    write_set(tmp_path / "shards", {"train": [(8, 8)] * 80 + [(8, 24)] * 80})
    found = ranks(loop_ranks.ranks_streamed, tmp_path / "shards", tmp_path / "run")
    images, tokens = (sum(rank[name] for rank in found) for name in ("images", "tokens"))
    assert len(set(found[0]["first"])) == 2, "the first step has both sizes"
    for rank in found:
        assert rank["norm"] == pytest.approx(rank["expected"], rel=1e-4)
        assert rank["samples"] == images
        assert rank["tokens_per_image"] == pytest.approx(tokens / images)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_compiled_blocks_train_as_others(
    stage: int, ranks: Ranks, digits: Path, tmp_path: Path
) -> None:
    """With gradient accumulation, and with activation checkpointing of every other block."""
    for apart, graphs in ranks(loop_ranks.ranks_compiled, stage, digits, tmp_path):
        assert apart < 1e-6 and graphs > 0
