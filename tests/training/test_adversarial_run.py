"""A run with a discriminator: resumed, exported, begun from, stopped, planned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.export import describe, export
from r2id.checkpoints.state import Shape
from r2id.config import RiaeRun, load_config
from r2id.errors import InputError, NonFiniteError
from r2id.models.codec import Codec
from r2id.models.riae import RIAE
from r2id.models.tracing import count_flops
from r2id.training.engines import base
from r2id.training.loop import train
from r2id.training.losses.discriminator import Discriminator
from r2id.training.planner import memory
from r2id.training.workload import Dimensions, Workload, image_cost, parameter_count
from tests.training import adversarial_ranks as job

CONFIG = """
stage = "riae"
[riae]
latent_channels = 3
downsample = 2.0
width = 16
[loss]
discriminator = 0.1
discriminator_start = 1
discriminator_width = 4
[train]
steps = 4
batch = 8
micro_batch = 4
log_every = 1
save_every = 1
keep = 9
[tracking]
enabled = false
"""
NETWORK = parameter_count(Discriminator(1, 4))


def run_config(folder: Path, digits: Path, *more: Any) -> RiaeRun:
    folder.mkdir(exist_ok=True)
    (folder / "riae.toml").write_text(CONFIG)
    config = load_config(
        folder / "riae.toml", [f"run={folder}/run", f"data.shards={digits}", *more]
    )
    assert isinstance(config, RiaeRun)
    return config


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("finished")
    train(run_config(folder, digits))
    return folder


def test_a_resumed_run_equals_one_that_was_not(
    finished: Path, digits: Path, tmp_path: Path
) -> None:
    for steps in (1, 2, 4):
        # With the learning rates of the whole run.
        more = ("optim.lr_end=1e-3", "optim.warmup=0", f"train.steps={steps}")
        found = train(run_config(tmp_path, digits, *more))
    train(run_config(tmp_path / "whole", digits, *more))
    assert {"generator", "discriminator", "r1", "r2", "pixel"} <= set(found)
    one, other = (Checkpoint.open(path / "run") for path in (tmp_path, tmp_path / "whole"))
    assert set(one.kinds()) == {"model", "ema", "optimizer", "stats", "discriminator"}
    for kind in one.kinds():
        for name, value in one.tensors(kind).items():
            assert torch.equal(value, other.tensors(kind)[name]), f"{kind} {name}"


def test_whoever_loads_the_model_does_not_meet_it(finished: Path, tmp_path: Path) -> None:
    codec = Codec.load(finished / "run")
    assert isinstance(codec.model, RIAE)
    export(finished / "run", tmp_path / "riae.safetensors")
    model = RIAE.from_pretrained(tmp_path / "riae.safetensors")
    for name, value in codec.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert describe(finished / "run")["parameters"] == parameter_count(codec.model)
    assert describe(finished / "run")["bytes"]["discriminator"] > 4 * NETWORK


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_another_run_begins_with_the_model_alone(
    weight: float, finished: Path, digits: Path, tmp_path: Path
) -> None:
    more = f"init_from={finished}/run", f"loss.discriminator={weight}", "train.steps=1"
    train(run_config(tmp_path, digits, *more))
    begun, before = Checkpoint.open(tmp_path / "run"), Checkpoint.open(finished / "run")
    assert ("discriminator" in begun.kinds()) == bool(weight)
    if weight:  # it is a new one, which has not begun in the first step
        found, old = (path.tensors("discriminator") for path in (begun, before))
        assert not torch.equal(*(it["discriminator.judge.weight"] for it in (found, old)))


def test_a_run_without_it_is_not_gone_on_with(
    finished: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(run_config(tmp_path, digits, "loss.discriminator=0.0", "train.steps=1"))
    with pytest.raises(InputError, match=r"loss\.discriminator = 0\.0, not 0\.1"):
        train(run_config(tmp_path, digits))
    # Of a checkpoint that is older than the setting.
    checkpoint = Checkpoint.open(tmp_path / "run")
    with pytest.raises(InputError, match=r"no discriminator.*loss\.discriminator.*init_from"):
        job.make(job.ALONE, None).check(_Renamed(checkpoint, job.make(job.ALONE, None)))


class _Renamed:
    """A checkpoint's kinds with an engine's shapes."""

    def __init__(self, checkpoint: Checkpoint, engine: base.Engine) -> None:
        self.checkpoint, self.engine = checkpoint, engine

    step = 0

    def kinds(self) -> list[str]:
        return self.checkpoint.kinds()

    def shapes(self, kind: str) -> dict[str, Shape]:
        return {
            prefix + name: shape
            for prefix in (("exp_avg.", "exp_avg_sq.") if kind == "optimizer" else ("",))
            for name, shape in self.engine.shapes.items()
            if kind == "optimizer" or not name.startswith("discriminator.")
        }

    def read(self, kind: str, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        raise AssertionError("nothing is to be read")


@pytest.mark.parametrize("how", ["parameter", "module"])
def test_it_stops_the_run_when_it_is_not_finite(
    how: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = Discriminator.forward, []

    def spoilt(self: Discriminator, *inputs: Any) -> torch.Tensor:
        calls.append(1)
        if how == "parameter" and len(calls) == 12:  # after the first step that has it
            self.see.weight.data.view(-1)[5] = math.nan
        found = forward(self, *inputs)
        return found * math.inf if how == "module" and len(calls) >= 12 else found

    monkeypatch.setattr(Discriminator, "forward", spoilt)
    words = {"parameter": r"parameter discriminator\.see\.weight", "module": "module discriminator"}
    with pytest.raises(NonFiniteError, match=rf"step [23]: .*{words[how]} ") as raised:
        train(run_config(tmp_path, digits))
    found = Checkpoint.open(tmp_path / "run")
    assert found.step == raised.value.step
    assert all(value.isfinite().all() for value in found.tensors("discriminator").values())


def test_a_plan_counts_it(digits: Path, tmp_path: Path) -> None:
    with_it, without = (
        Workload(
            run_config(
                tmp_path,
                digits,
                f"loss.discriminator={weight}",
                "loss.magnify=0.0",  # whose steps are fullest where no discriminator sees them
                "train.micro_batch=8",
            ),
            Dimensions((16, 16), 1),
        )
        for weight in (0.1, 0.0)
    )
    needed, less = memory(with_it, 1), memory(without, 1)
    assert needed["weights"] - less["weights"] == 4 * NETWORK
    assert needed["optimizer"] - less["optimizer"] == 8 * NETWORK
    assert needed["activations"] > less["activations"]
    once = count_flops(lambda: lambda: Discriminator(1, 4)(torch.zeros(1, 1, 16, 16), (1.0, 1.0)))
    # Three forward passes, the gradients of two of them, and as much again twice for backward.
    found = image_cost(with_it).flops - image_cost(without).flops
    assert found == pytest.approx(3 * (3 + 2) * once, rel=0.1)
