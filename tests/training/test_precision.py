"""train.precision auto: decided by the machine that a run begins on, and kept from then on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import RiaeRun, TrainConfig, load_config
from r2id.models.codec import Codec
from r2id.training import precision
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.children import Ranks


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each forward pass ran under autocast."""
    found: list[bool] = []
    forward = WindowLoss.forward

    def noted(self: WindowLoss, *args: object, **batch: object) -> object:
        if not isinstance(next(self.parameters()), FakeTensor):  # as those of the cost's count
            found.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **batch)

    monkeypatch.setattr(WindowLoss, "forward", noted)
    return found


def on_a_machine(monkeypatch: pytest.MonkeyPatch, *, fast: bool) -> None:
    monkeypatch.setattr(precision, "bfloat16_is_fast", lambda _device: fast)


def config(digits: Path, run: Path, *more: str) -> RiaeRun:
    settings = [*TINY_RIAE, "riae.width=16", f"run={run}", f"data.shards={digits}"]
    loaded = load_config(CONFIGS / "digits" / "riae.toml", [*settings, "train.steps=2", *more])
    assert isinstance(loaded, RiaeRun)
    return loaded


def recorded(run: Path) -> str:
    """The precision in the checkpoint, and in the config beside it."""
    kept = load_config(run / "config.toml")
    assert isinstance(kept, RiaeRun)
    assert kept.train.precision == Checkpoint.open(run).meta.config["train"]["precision"]
    return kept.train.precision


@pytest.mark.parametrize("fast", [True, False])
def test_a_run_begins_as_its_machine_is_fast_and_stays_so_on_others(
    fast: bool,
    digits: Path,
    tmp_path: Path,
    seen: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chosen = "bfloat16" if fast else "float32"
    on_a_machine(monkeypatch, fast=fast)
    train(config(digits, tmp_path / "run"))
    assert capfd.readouterr().err.count(f"train.precision auto: {chosen}, ") == 1
    on_a_machine(monkeypatch, fast=not fast)
    train(config(digits, tmp_path / "run", "train.steps=4"))
    said = capfd.readouterr().err
    assert f"train.precision auto: {chosen}, as the run began" in said
    assert "train.precision = " not in said, "nothing has changed"
    assert seen == [fast] * 4
    assert recorded(tmp_path / "run") == chosen
    assert Codec.load(tmp_path / "run").bfloat16 == fast


@pytest.mark.parametrize("fast", [True, False])
def test_what_is_asked_for_is_done_on_every_machine(
    fast: bool, digits: Path, tmp_path: Path, seen: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_machine(monkeypatch, fast=fast)
    for asked, autocast in {"float32": False, "bfloat16": True}.items():
        train(config(digits, tmp_path / asked, f"train.precision={asked}"))
        assert seen == [autocast] * 2
        assert recorded(tmp_path / asked) == asked
        seen.clear()


def test_a_run_that_had_bfloat16_weights_goes_on_in_bfloat16(digits: Path, tmp_path: Path) -> None:
    asked = config(digits, tmp_path)
    found = precision.resolve_precision(asked, torch.device("cpu"), "bfloat16_weights")
    assert found.train.precision == "bfloat16"


def test_a_plan_counts_auto_as_a_gpu_does() -> None:
    assert TrainConfig(steps=1).precision == "auto" and TrainConfig(steps=1).autocast


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("avx", [True, False])
def test_a_cpu_is_fast_that_multiplies_bfloat16(
    amx: bool, avx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert precision.bfloat16_is_fast(torch.device("cpu")) == (amx or avx)


def _on_unlike_machines(_world: dist.World, shards: Path, run: Path) -> str:
    precision.bfloat16_is_fast = lambda _device: dist.is_main()
    found = precision.resolve_precision(config(shards, run), torch.device("cpu"))
    return found.train.precision


def test_the_first_rank_decides_for_all(ranks: Ranks, digits: Path, tmp_path: Path) -> None:
    assert ranks(_on_unlike_machines, digits, tmp_path) == ["bfloat16", "bfloat16"]
