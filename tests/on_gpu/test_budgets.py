"""What a step may cost the host: kernels to launch, and none or one wait for the device.

A bound that breaks is a regression, or a change that is worth its kernels and then raises it.
Figures of the configs are made by tests/bench/kernels.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from r2id.training import loop
from r2id.training.step import step_or_skip
from tests.bench import kernels
from tests.stand_in import REAL, Counts
from tests.training.configs import attention_config, r2id_config, riae_config

pytestmark = pytest.mark.skipif(REAL, reason="a real GPU is not counted")
RANDOM = 40
"""Kernels of random numbers in a micro-batch."""
CASES = {
    "riae": (
        kernels.CASES["MNIST reference RIAE"],
        {"a micro-batch": 470, "an optimizer step": 24},
    ),
    "riae by attention": (
        kernels.CASES["MNIST RIAE by attention"],
        {"a micro-batch": 530, "an optimizer step": 24},
    ),
    "r2id": (
        replace(
            kernels.CASES["MNIST reference R2ID"],
            overrides=("r2id.width=32", "r2id.encoder_blocks=2", "r2id.decoder_blocks=2"),
        ),
        {
            "a micro-batch": 710,
            "an optimizer step": 24,
            "a sampling step": 205,
            "a sampling step with η = 1": 276,
        },
    ),
}
"""What is counted, and the most kernels of each part."""
SHORT = ("train.steps=4", "train.batch=8", "train.log_every=100", "data.train_split=test")
STAGES = {
    "lattice": ("loss.equivariance=0.3", "loss.magnify=0.4"),
    "attention": ("loss.jitter=0.5", "loss.decode_cloud=0.5"),
    "r2id": (
        'r2id.attention=["full","cloud","tiled"]',
        "r2id.cloud_tokens=6",
        "r2id.encoder_blocks=2",
        "train.micro_batch=4",
        "sample.steps=2",
    ),
}


@pytest.mark.parametrize(("case", "most"), CASES.values(), ids=CASES)
def test_steps_stay_within_their_budgets(case: kernels.Case, most: dict[str, int]) -> None:
    found = kernels.count(case)
    assert found["a micro-batch"].random <= RANDOM
    assert found["an optimizer step"].syncs.total() <= 1
    assert not any(found[part].syncs for part in most.keys() - {"an optimizer step"})
    launched = {part: found[part].kernels.total() for part in most}
    assert all(launched[part] <= bound for part, bound in most.items()), launched


@pytest.mark.parametrize(("stage", "more"), STAGES.items(), ids=STAGES)
def test_a_training_waits_at_most_once_per_step(
    digits: Path,
    riae_run: Path,
    latents: Path,
    tmp_path: Path,
    counts: Counts,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    more: tuple[str, ...],
) -> None:
    """From the beginning of a step to that of the next, callbacks and loading included."""
    waits = []

    def noting(*given: Any) -> None:
        waits.append(Counter(counts.syncs))
        step_or_skip(*given)

    monkeypatch.setattr(loop, "step_or_skip", noting)
    given = (*SHORT, *more)
    if stage == "r2id":
        given = (f"data.latents={latents}", *given)
        config = r2id_config(digits, riae_run, tmp_path / "run", *given)
    else:
        make = riae_config if stage == "lattice" else attention_config
        config = make(digits, tmp_path / "run", *given)
    loop.train(config)
    assert len(waits) == 4
    for before, after in pairwise(waits):
        assert (after - before).total() <= 1, after - before
