"""A discriminator that is trained beside a model: in one process, in two, and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from r2id.checkpoints import Checkpoint
from r2id.models.riae import RIAE
from tests.training import adversarial_ranks as job
from tests.training.children import Ranks

KINDS = ("model", "discriminator", "ema", "optimizer")
RESUMED = (job.START - 1, job.START + 1)


def saved(folder: Path, step: int = job.STEPS) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by kind and name."""
    checkpoint = Checkpoint.open(folder / "checkpoints" / f"step-{step:08d}")
    assert set(checkpoint.kinds()) == set(KINDS)
    return {
        f"{kind} {name}": value
        for kind in KINDS
        for name, value in checkpoint.tensors(kind).items()
    }


def assert_resumed(folder: Path, norms: dict[int, list[float]]) -> None:
    """What was resumed equals what was not, bit for bit."""
    for first in RESUMED:
        assert norms[first] == norms[0][first:]
        torch.testing.assert_close(saved(folder / f"from-{first}"), saved(folder), rtol=0, atol=0)


def test_it_is_trained_from_its_start_saved_and_resumed(tmp_path: Path) -> None:
    assert_resumed(tmp_path, job.train(job.ALONE, None, tmp_path))
    first, begun, end = (saved(tmp_path, step) for step in (0, job.START, job.STEPS))
    for name, value in end.items():
        if "discriminator" in name:
            assert torch.equal(first[name], begun[name]), f"{name} moved before the start"
            assert not torch.equal(first[name], value), f"{name} has not moved"
    held = {kind: Checkpoint.open(tmp_path).shapes(kind) for kind in KINDS}
    assert not [name for kind in ("model", "ema") for name in held[kind] if "discr" in name]
    for name in held["discriminator"]:
        assert name.startswith("discriminator.") and f"exp_avg.{name}" in held["optimizer"]


def test_its_first_update_is_as_large_as_any(tmp_path: Path) -> None:
    """Adam's averages are corrected for the steps since the start, not since the run's."""
    engine = job.make(job.ALONE, None)
    job.run(engine, 0, job.START, job.ALONE)
    before = engine.state().parts["discriminator"]["discriminator.judge.weight"].values.clone()
    job.run(engine, job.START, job.START + 1, job.ALONE)
    after = engine.state().parts["discriminator"]["discriminator.judge.weight"].values
    # Without momentum, Adam's first update is the learning rate, in the gradient's direction.
    lr = 1e-3 * (job.START + 1)
    torch.testing.assert_close(
        (after - before).abs(), torch.full_like(after, lr), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("stage", [1, *(pytest.param(it, marks=pytest.mark.slow) for it in (0, 2))])
def test_two_processes_train_and_resume_as_one(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    expected = job.train(job.ALONE, None, tmp_path / "one")
    norms = ranks(job.train, stage, tmp_path / "two")[0]
    assert norms[0] == pytest.approx(expected[0], rel=1e-4)
    # As in test_engine_ranks: the order of float32 sums differs, and Adam magnifies that.
    torch.testing.assert_close(
        saved(tmp_path / "two"), saved(tmp_path / "one"), rtol=1e-4, atol=2e-5
    )
    assert_resumed(tmp_path / "two", norms)


def assert_decoder_alone_moved(folder: Path) -> None:
    first, last = (
        Checkpoint.open(folder / "checkpoints" / f"step-{step:08d}") for step in (0, job.STEPS)
    )
    model = RIAE(job.RIAE_CONFIG, 1)
    encoder = {id(weight) for weight in model.parts.encoder.parameters()}
    frozen = {name for name, weight in model.named_parameters() if id(weight) in encoder}
    for kind in ("model", "ema"):
        before, after = first.tensors(kind), last.tensors(kind)
        assert frozen == {name for name, value in after.items() if value.equal(before[name])}, kind


def test_a_frozen_encoder_stays_in_one_process(tmp_path: Path) -> None:
    job.train_decoder(job.ALONE, None, tmp_path)
    assert_decoder_alone_moved(tmp_path)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_frozen_encoder_stays_in_two_processes(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    ranks(job.train_decoder, stage, tmp_path)
    assert_decoder_alone_moved(tmp_path)


@pytest.mark.slow
def test_bfloat16_in_two_processes_follows_one(ranks: Ranks) -> None:
    expected = job.run_once(job.ALONE, None, "bfloat16")
    found = ranks(job.run_once, 1, "bfloat16")[0]
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != pytest.approx(job.run_once(job.ALONE, None, "float32"), rel=1e-4)
