"""The callback interface: when callbacks are called, in what order, and how they end."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from r2id.training import callbacks, step
from r2id.training.callbacks import Callback, Callbacks
from r2id.training.callbacks.progress import ProgressDisplay
from r2id.training.loop import train
from r2id.training.state import TrainState
from r2id.training.tasks import Batch
from tests.training.configs import riae_config


class Recorder(Callback):
    """Notes every call."""

    calls: list[str]

    def pre_train(self, state: TrainState) -> None:
        self.calls.append(f"begin {state.step}")

    def pre_load(self, state: TrainState) -> None:
        self.calls.append(f"load {state.step}")

    def pre_step(self, state: TrainState) -> None:
        self.calls.append(f"step {state.step} of {len(state.micro_batches)}")

    def post_step(self, state: TrainState) -> None:
        self.calls.append(f"done {state.step} {len(state.results)} {state.samples}")

    def close(self, state: TrainState, error: BaseException | None) -> None:
        self.calls.append(f"end {error!r}")


def test_a_callback_takes_one_line_in_the_registry(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recorder.calls = []
    monkeypatch.setattr(callbacks, "REGISTRY", (*callbacks.REGISTRY, Recorder))
    config = riae_config(digits, tmp_path, "train.steps=2", "train.batch=8", "train.micro_batch=4")
    train(config)
    assert Recorder.calls == [
        "begin 0",
        *("load 0", "step 0 of 2", "done 1 2 8"),
        *("load 1", "step 1 of 2", "done 2 2 16"),
        "end None",
    ]


class Named(Callback):
    def __init__(self, name: str, calls: list[str], fails: bool = False) -> None:
        self.name, self.calls, self.fails = name, calls, fails

    def pre_train(self, state: TrainState) -> None:
        if self.fails:
            raise OSError(self.name)
        self.calls.append(self.name)

    def post_step(self, state: TrainState) -> None:
        self.calls.append(self.name)

    def close(self, state: TrainState, error: BaseException | None) -> None:
        self.calls.append(f"{self.name} {error!r}")
        if self.name == "b":
            raise ValueError("b")


def test_those_that_began_end_in_the_reverse_order(state: TrainState) -> None:
    calls: list[str] = []
    several = Callbacks([Named(name, calls) for name in "abc"])
    with pytest.raises(ValueError, match="b"), several.around(state):
        several.post_step(state)
        calls.append("-")
    # What fails at its end keeps no other from ending, and that one hears of it.
    assert calls == [*"abc", *"abc", "-", "c None", "b None", "a ValueError('b')"]


def test_an_error_at_the_end_hides_none_before_it(
    state: TrainState, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    first = RuntimeError("first")
    several = Callbacks([Named(name, calls) for name in "abc"])
    with pytest.raises(RuntimeError, match="first"), several.around(state):
        raise first
    assert calls == [*"abc", *(f"{name} {first!r}" for name in "cba")]
    assert capsys.readouterr().err == "Named: b\n"


def test_figures_of_skipped_steps_are_not_those_before_them(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an interval in which all steps were skipped, there is no loss to be logged."""
    spoilt = {2, 3}
    forward = step._forward

    def with_fault(
        state: TrainState, batch: Batch, number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, figures = forward(state, batch, number)
        return (loss * math.nan if number in spoilt else loss), figures

    logged: list[dict[str, float]] = []

    class Seen(Callback):
        def post_step(self, state: TrainState) -> None:
            if state.log_due:
                logged.append(dict(state.figures))

    monkeypatch.setattr(step, "_forward", with_fault)
    monkeypatch.setattr(callbacks, "REGISTRY", (*callbacks.REGISTRY, Seen))
    overrides = ("train.steps=6", "train.log_every=2", "train.skip_nonfinite=2")
    result = train(riae_config(digits, tmp_path, *overrides))
    assert ["loss" in figures for figures in logged] == [True, False, True]
    assert all("images_per_second" in figures for figures in logged)
    assert result["loss"] == logged[-1]["loss"] != logged[0]["loss"]


def test_one_that_cannot_begin_ends_those_before_it(state: TrainState) -> None:
    calls: list[str] = []
    several = Callbacks([Named("a", calls), Named("c", calls, fails=True), Named("d", calls)])
    with pytest.raises(OSError, match="c"), several.around(state):
        calls.append("never")
    assert calls == ["a", "a OSError('c')"]


@pytest.fixture
def state() -> TrainState:
    """These callbacks ask it nothing."""
    return object()  # type: ignore[return-value]


def test_the_shown_rate_says_what_it_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of a command has another, of training alone."""
    config = SimpleNamespace(stage="riae", train=SimpleNamespace(steps=2, batch=4))
    state: Any = SimpleNamespace(config=config, start=0, figures={}, log_due=False)
    display = ProgressDisplay()
    display.pre_train(state)
    display.post_step(state)
    display.close(state, None)
    assert " images/s with previews and saving, " in capsys.readouterr().err
