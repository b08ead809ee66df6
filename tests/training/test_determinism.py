"""train.deterministic: it takes effect while a run trains, and leaves everything as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.images import resize
from r2id.models.lattice import _between
from r2id.training.determinism import deterministic
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from tests.training.configs import r2id_config, riae_config, without_cache


def settings() -> dict[str, Any]:
    """What of torch's settings a run could change."""
    cudnn = torch.backends.cudnn
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "cudnn": (cudnn.deterministic, cudnn.benchmark, cudnn.enabled, cudnn.allow_tf32),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings in each forward pass of an RIAE."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    found: list[dict[str, Any]] = []
    forward = WindowLoss.forward

    def noted(self: WindowLoss, *args: Any, **batch: Any) -> Any:
        if torch.is_grad_enabled():  # not where FLOPs are counted
            found.append(settings() | {"cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG")})
        return forward(self, *args, **batch)

    monkeypatch.setattr(WindowLoss, "forward", noted)
    return found


def test_it_holds_while_a_run_trains(
    during: list[dict[str, Any]], digits: Path, tmp_path: Path
) -> None:
    before = settings()
    every = ("train.steps=3", "loss.equivariance=0.5", "loss.magnify=0.4")
    train(riae_config(digits, tmp_path / "on", *every, "train.deterministic=true"))
    assert settings() == before
    changed = {
        "deterministic": True,
        "cudnn": (True, False, *before["cudnn"][2:]),
        "cublas": ":4096:8",
    }
    assert during and all(seen == before | changed for seen in during)
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG")
    during.clear()
    train(riae_config(digits, tmp_path / "off", *every))
    assert during and all(seen == before | {"cublas": None} for seen in during)
    for kind in ("model", "ema"):  # the same, computed in another order
        other = Checkpoint.open(tmp_path / "off").tensors(kind)
        for name, value in Checkpoint.open(tmp_path / "on").tensors(kind).items():
            torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-4)


def test_an_r2id_trains_in_it(digits: Path, riae_run: Path, tmp_path: Path) -> None:
    more = ("train.steps=2", "train.deterministic=true")
    assert train(without_cache(r2id_config(digits, riae_run, tmp_path, *more)))["step"] == 2


def test_a_failure_and_a_choice_of_the_users_leave_it_as_it_was() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        before = settings()
        with pytest.raises(KeyError), deterministic(True):
            assert settings()["deterministic"] and not settings()["warn only"]
            raise KeyError
        assert settings() == before
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [(5, 7), (12, 9), (16, 4)])
def test_resizing_has_the_same_values_and_gradients(size: tuple[int, int]) -> None:
    images = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for wanted in (False, True):
        given = images.clone().requires_grad_()
        with deterministic(wanted), torch.autocast("cpu", torch.bfloat16):
            resized = resize(given, size)
        (gradient,) = torch.autograd.grad(resized.square().sum(), given)
        assert ("Upsample" in type(resized.grad_fn).__name__) != wanted
        found.append((resized, gradient))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


def test_interpolation_has_the_same_values_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.linspace(-0.9, 4.7, 13), torch.linspace(-0.5, 3.6, 7)
    found = []
    for wanted in (False, True):
        given = x.clone().requires_grad_()
        with deterministic(wanted):
            seen = _between(given, rows, columns)
            (gradient,) = torch.autograd.grad(seen.square().sum(), given)
        found.append((seen, gradient))
        monkeypatch.delattr(F, "grid_sample", raising=False)  # the second does without it
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-5)


def test_only_a_gpus_float32_products_become_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        dist.allow_tf32(torch.device("cpu"))
        assert not matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
        dist.allow_tf32(torch.device("cuda", 0))
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before
