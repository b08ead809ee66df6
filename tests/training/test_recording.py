"""Recorded steps, with a recording that computes anew instead of starting a CUDA graph.

On a real GPU: R2ID_TEST_GPU=1 pytest tests/on_gpu, whose trainings of R2ID are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from r2id import constants
from r2id.config import DiffusionConfig, EngineConfig, OptimConfig, R2idConfig, TrainConfig
from r2id.dist import World
from r2id.errors import InputError
from r2id.models.r2id import R2ID
from r2id.training import recording
from r2id.training.engines import make_engine
from r2id.training.losses.r2id import R2idLoss
from r2id.training.recording import RecordedLoss, recorded_loss

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SMALL = {"width": 16, "heads": 2, "encoder_blocks": 1, "decoder_blocks": 1, "dropout": 0.0}


def build(**settings: Any) -> R2idLoss:
    torch.manual_seed(0)
    model = R2ID(R2idConfig(**{**SMALL, "jitter": 1.0, **settings}), 3, 2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return R2idLoss(model, DiffusionConfig(condition_dropout=0.5), 4.0, seed=0)


def batch(step: int, height: int = 4, count: int = 3) -> dict[str, Any]:
    torch.manual_seed(step)
    return {
        "latent": torch.randn(count, 3, height, 4),
        "condition": torch.tensor([0, 1, 0])[:count],
        "index": torch.arange(count) + 5 * step,
        "step": step,
    }


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Let recordings be made without a GPU; has one item for each that was made."""
    made: list[None] = []

    def record(run: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None], str]:
        assert pool == ("pool" if made else None)
        result = run()
        made.append(None)

        def replay() -> None:
            for kept, new in zip(tree_leaves(result), tree_leaves(run()), strict=True):
                if isinstance(kept, Tensor):
                    kept.copy_(new.detach())

        return result, replay, "pool"

    monkeypatch.setattr(recording, "record", record)
    return made


def gradients(loss: R2idLoss) -> list[Tensor]:
    found = [parameter.grad for parameter in loss.parameters()]
    loss.zero_grad(set_to_none=True)
    assert all(gradient is not None for gradient in found)
    return [gradient.clone() for gradient in found if gradient is not None]


@pytest.mark.parametrize("settings", [{}, {"levels": ({"width": 16, "blocks": 1},), "tile": 2}])
def test_a_recorded_step_is_one_that_is_not(recorded: list[None], settings: dict[str, Any]) -> None:
    """Over several steps and micro-batches, of two shapes in turn."""
    loss = build(**settings)
    replayed = RecordedLoss(loss, list(loss.parameters()), autocast=False)
    for step in range(4):
        given = [batch(10 * step + n, height=4 + 2 * (step % 2)) for n in range(1 + step % 3)]
        wanted = []
        for one in given:
            value, figures = loss(**one)
            (value / len(given)).backward()
            wanted.append({"loss": value.detach(), **figures})
        wanted_gradients, found = gradients(loss), []
        for one in given:
            value, figures = replayed.forward(one)
            replayed.backward(value, len(given))
            found.append({"loss": value, **figures})
        torch.testing.assert_close(gradients(loss), wanted_gradients)
        torch.testing.assert_close(found, wanted)  # the first ones too, after the last
    assert len(recorded) == 2


def test_too_many_shapes_are_computed_one_kernel_at_a_time(
    recorded: list[None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MOST", 2)
    loss = build()
    replayed = RecordedLoss(loss, list(loss.parameters()), autocast=False)
    for height in (3, 4, 5, 3, 5):
        value, _ = loss(**batch(height, height))
        value.backward()
        wanted = gradients(loss)
        found, _ = replayed.forward(batch(height, height))
        replayed.backward(found, 1)
        torch.testing.assert_close(gradients(loss), wanted)
    assert len(recorded) == 2


def test_constants_of_a_recording_are_held() -> None:
    made = []

    @constants.cached_tensors(1)
    def numbers(count: int) -> Tensor:
        made.append(count)
        return torch.arange(count)

    first = numbers(3)
    with constants.hold_cached() as found:
        assert numbers(3) is first and len(found) == 1 and found[0] is first
    numbers(4)
    assert numbers(3) is not first and made == [3, 4, 3] and len(found) == 1


def made(module: nn.Module, device: torch.device = GPU, **train: Any) -> RecordedLoss | None:
    return recorded_loss(module, list(module.parameters()), TrainConfig(steps=1, **train), device)


def test_what_is_recorded() -> None:
    assert made(build()) and made(build(), compile="cuda_graphs")
    assert not made(build(), compile=False) and not made(build(), compile=True)


@pytest.mark.parametrize(
    ("settings", "device", "train"),
    [
        ({}, CPU, {}),
        ({"attention": ("full", "cloud")}, GPU, {}),
        ({}, GPU, {"activation_checkpointing": "all"}),
        (None, GPU, {}),
    ],
)
def test_what_cannot_be_recorded_is_refused_only_where_it_is_asked_for(
    settings: dict[str, Any] | None, device: torch.device, train: dict[str, Any]
) -> None:
    module = nn.Linear(2, 2) if settings is None else build(**settings)
    assert made(module, device, **train) is None
    with pytest.raises(InputError, match=r"'cuda_graphs': records an R2ID on a GPU"):
        made(module, device, compile="cuda_graphs", **train)


def test_recordings_are_for_one_process() -> None:
    train, engine = TrainConfig(steps=1, compile="cuda_graphs"), EngineConfig(kind="deepspeed")
    with pytest.raises(InputError, match=r"cuda_graphs': is for engine.kind 'local'"):
        make_engine(
            build(), optim=OptimConfig(), train=train, engine=engine, world=World(0, 1, 0, GPU)
        )
