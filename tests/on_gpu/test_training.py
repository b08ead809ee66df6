"""Every kind of both models trains on a GPU as on a CPU, on the stand-in of tests/stand_in.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from r2id.checkpoints import Checkpoint
from r2id.errors import NonFiniteError
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from tests.stand_in import REAL, Counts, stand_in_gpu
from tests.training.configs import attention_config, r2id_config, riae_config

SHORT = ("train.steps=2", "train.batch=8", "train.log_every=1", "data.train_split=test")
LATTICE = {
    "plain": (),
    "resized latents": ("loss.equivariance=1.0", "loss.latent_noise=0.3"),
    "smaller pictures": ("loss.equivariance=0.0", "loss.magnify=1.0", "riae.linear=false"),
    "all terms": (
        "loss.texture=0.1",
        "loss.ssim=0.1",
        "loss.spectrum=0.1",
        "loss.pixel=charbonnier",
        "loss.discriminator=0.1",
        "loss.discriminator_start=1",
        "loss.discriminator_width=8",
        "loss.equivariance=1.0",
        "loss.latent_noise=0.3",
    ),
    "windows, activations again": ("loss.window=[6,5]", "train.activation_checkpointing=all"),
}
ATTENTION = {
    "cloud": (),
    "cloud of latents": ("loss.decode_cloud=0.5", "loss.jitter=0.5", "loss.texture=0.1"),
    "linear": ("riae.linear=true",),
}
R2ID = {
    "context": (),
    "cross": ("r2id.conditioning=cross", "diffusion.multiscale=1"),
    "no condition": ("r2id.condition=none", "diffusion.objective=v", "diffusion.schedule=cosine"),
    "cloud": ('r2id.attention=["cloud"]', "r2id.cloud_tokens=6"),
    "axial and linear, activations again": (
        'r2id.attention=["axial","linear"]',
        "train.activation_checkpointing=2",
    ),
    "tiled": ('r2id.attention=["tiled"]', "r2id.tile=2", "r2id.halo=1"),
    "levels": ("r2id.levels=[{width=32,blocks=1}]", "train.micro_batch=4"),
    "all kinds": (
        'r2id.attention=["cloud","tiled","axial","linear"]',
        "r2id.cloud_tokens=6",
        "r2id.tile=2",
        "r2id.halo=1",
        "r2id.encoder_blocks=3",
        "r2id.levels=[{width=32,blocks=1}]",
        "r2id.conditioning=cross",
        "diffusion.multiscale=1",
        "train.activation_checkpointing=2",
        "train.micro_batch=4",
    ),
    "bfloat16": ("train.precision=bfloat16",),
}
FAST = ("all terms", "windows, activations again", "cloud of latents", "linear", "all kinds")
"""Those that have most of what the others have one by one; the others are slow."""


def each(settings: dict[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    """Run a test with each of these settings."""
    return pytest.mark.parametrize(
        "more",
        [
            pytest.param(more, id=name, marks=[] if name in FAST else pytest.mark.slow)
            for name, more in settings.items()
        ],
    )


def assert_agree(config: Any, folder: Path, rel: float = 1e-2 if REAL else 1e-3) -> None:
    """Train on the CPU and on the GPU, and compare all losses. A real GPU multiplies in TF32."""
    found = []
    for name in ("cpu", "gpu"):
        moved = config.model_copy(update={"run": folder / name})
        if name == "cpu":
            found.append(train(moved))
        else:
            with stand_in_gpu():
                found.append(train(moved))
    on_cpu, on_gpu = found
    losses = {key for key in on_cpu if "loss" in key or "mse" in key or "rms" in key}
    assert "loss" in losses and on_gpu["step"] == 2
    for key in losses:
        assert on_gpu[key] == pytest.approx(on_cpu[key], rel=rel), key


@each(LATTICE)
def test_an_riae_on_a_lattice(digits: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert_agree(riae_config(digits, tmp_path / "run", *SHORT, *more), tmp_path)


@each(ATTENTION)
def test_an_riae_by_attention(digits: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    assert_agree(attention_config(digits, tmp_path / "run", *SHORT, *more), tmp_path)


@each(R2ID)
def test_an_r2id(
    digits: Path, riae_run: Path, latents: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    rel = {"rel": 0.02} if "train.precision=bfloat16" in more else {}
    more = (f"data.latents={latents}", "sample.steps=2", *SHORT, *more)
    assert_agree(r2id_config(digits, riae_run, tmp_path / "run", *more), tmp_path, **rel)


def test_a_step_that_is_not_finite_is_skipped_where_the_state_is_saved(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counts: Counts
) -> None:
    """A GPU finds out one step late, and there is none after the last step or before saving."""
    forward = WindowLoss.forward

    def spoilt(self: WindowLoss, image: Tensor, index: Tensor, step: int) -> Any:
        loss, figures = forward(self, image, index, step)
        return loss * (float("nan") if step in (1, 3) else 1.0), figures

    monkeypatch.setattr(WindowLoss, "forward", spoilt)
    given = (*SHORT, "train.steps=4", "train.save_every=2")
    train(riae_config(digits, tmp_path / "run", *given, "train.skip_nonfinite=2"))
    saved = Checkpoint.open(tmp_path / "run")
    assert saved.step == 4
    for kind in ("model", "ema", "optimizer"):
        assert all(value.isfinite().all() for value in saved.tensors(kind).values()), kind
    with pytest.raises(NonFiniteError, match="step 3"):
        train(riae_config(digits, tmp_path / "other", *given, "train.skip_nonfinite=1"))
