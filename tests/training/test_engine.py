"""The local engine, and what both engines share; many processes are in test_engine_ranks.py."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from r2id.checkpoints import reading
from r2id.checkpoints.averages import exponent_of
from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.dist import World
from r2id.errors import InputError, NonFiniteError
from r2id.training.engines import Engine, LocalEngine, make_engine
from r2id.training.engines.base import make_optimizer
from r2id.training.engines.settings import deepspeed_config
from tests.training import engine_ranks as job


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 4)
        self.layer = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.register_buffer("counts", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(self.table(x)))


class Loss(nn.Module):
    """(model(x)·scale − 1)², averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Net()

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.model(x).float() * scale - 1).square().mean()
        return loss, {"loss": loss.detach()}


X = torch.tensor([0, 1, 2, 1])


def values(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """A copy of the state of an engine alone: kind → name → tensor."""
    return {
        kind: {name: part.values.clone() for name, part in parts.items()}
        for kind, parts in engine.state().parts.items()
    }


def engine(precision: str = "float32", device: str = "cpu", **optim: float) -> Engine:
    torch.manual_seed(0)
    return make_engine(
        Loss(),
        optim=OptimConfig(**optim),
        train=TrainConfig(steps=9, batch=4, precision=precision),
        engine=EngineConfig(),
        world=World(0, 1, 0, torch.device(device)),
    )


def test_update_is_clipped_adamw() -> None:
    """Against torch's plain loop: the unfused update after clip_grad_norm_; an average by hand."""
    torch.manual_seed(0)
    loss_module = Loss()
    model = loss_module.model
    plain = torch.optim.AdamW(
        [
            {"params": [model.layer.weight], "weight_decay": 0.1},
            {
                "params": [p for p in model.parameters() if p is not model.layer.weight],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.9, 0.99),
        fused=False,
        foreach=False,
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = engine(clip=0.05, weight_decay=0.1)
    for step in range(5):
        lr = 0.01 * (step + 1)
        for group in plain.param_groups:
            group["lr"] = lr
        plain.zero_grad()
        loss_module(X)[0].backward()
        expected = nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        assert expected > 0.05, "the clip must bind"
        plain.step()
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - min(0.9995, (1 + step) / (10 + step)))
        trained.backward(trained.forward({"x": X})[0], 1)
        assert float(trained.step(lr, step)) == pytest.approx(float(expected), rel=1e-5)
        trained.ema.update(step)
    state = values(trained)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state["model"][name], p.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(state["ema"][name], average[name], rtol=1e-5, atol=1e-6)


def test_only_matrices_decay() -> None:
    loss = Loss()
    decayed, others = make_optimizer(loss, OptimConfig(weight_decay=0.5)).param_groups
    assert decayed["weight_decay"] == 0.5 and [
        p is loss.model.layer.weight for p in decayed["params"]
    ] == [True]
    assert others["weight_decay"] == 0.0 and len(others["params"]) == 4


def test_accumulated_micro_batches_make_one_batch() -> None:
    whole, parts = engine(), engine()
    whole.backward(whole.forward({"x": X})[0], 1)
    for x in X.split(2):
        parts.backward(parts.forward({"x": x})[0], 2)
    assert float(whole.step(0.1, 0)) == pytest.approx(float(parts.step(0.1, 0)), rel=1e-5)
    torch.testing.assert_close(values(whole)["model"], values(parts)["model"])


@pytest.mark.parametrize("scale", [math.nan, math.inf])
def test_not_finite_stops_before_the_update(scale: float) -> None:
    trained = engine()
    assert isinstance(trained, LocalEngine)
    trained.backward(trained.forward({"x": X})[0], 1)
    trained.step(0.1, 0)
    before = values(trained)
    trained.backward(trained.forward({"x": X, "scale": scale})[0], 1)
    with pytest.raises(NonFiniteError, match="step 1"):
        trained.step(0.1, 1)
    for (name, p), average in zip(trained.names.items(), trained.ema.averages["ema"], strict=True):
        assert torch.equal(p, before["model"][name]) and torch.equal(average, before["ema"][name])
    trained.backward(trained.forward({"x": X})[0], 1)  # and it is good for more
    assert math.isfinite(trained.step(0.1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_not_finite_on_a_gpu_never_reaches_the_weights() -> None:
    trained = engine(device="cuda")
    before = values(trained)["model"]
    trained.backward(trained.forward({"x": X.cuda(), "scale": math.nan})[0], 1)
    trained.step(0.1, 0)
    assert isinstance(trained, LocalEngine)
    assert all(torch.equal(p, before[name]) for name, p in trained.names.items())
    with pytest.raises(NonFiniteError, match="step 0"):
        trained.state()


def test_state_has_buffers_and_moments_from_the_start_and_copies_nothing() -> None:
    trained = engine()
    assert isinstance(trained, LocalEngine)
    state = trained.state()
    assert state.step == 0 and list(state.parts) == ["model", "optimizer", "ema"]
    assert "counts" in state.parts["model"] and "counts" in state.parts["ema"]
    moments = state.parts["optimizer"]
    assert "exp_avg.counts" not in moments and not moments["exp_avg_sq.layer.weight"].values.any()
    weight = state.parts["model"]["layer.weight"]
    assert weight.whole and weight.values.data_ptr() == trained.names["layer.weight"].data_ptr()


def test_several_averages_are_tracked_and_go_on(tmp_path: Path) -> None:
    """Each of a power function: the sum over steps i of i^(γ+1) − (i−1)^(γ+1), over t^(γ+1)."""
    profiles, sources = (0.05, 0.2), []

    def made() -> Engine:
        torch.manual_seed(0)
        return make_engine(
            Loss(),
            optim=OptimConfig(),
            engine=EngineConfig(),
            world=World(0, 1, 0, torch.device("cpu")),
            train=TrainConfig(steps=9, batch=4, precision="float32", ema_profiles=profiles),
        )

    trained = made()
    for step in range(6):
        if step == 3:
            job.save(tmp_path, trained.state())
            trained = made()
            reading.resume(tmp_path, trained.check, trained.load)
        trained.backward(trained.forward({"x": X})[0], 1)
        trained.step(0.1, step)
        trained.ema.update(step)
        sources.append(values(trained)["model"]["layer.weight"].double())
    found = values(trained)
    for kind, sigma in (("ema", 0.05), ("ema-0.2", 0.2)):
        power = exponent_of(sigma) + 1
        expected = sum(
            (((i + 1) / 6) ** power - (i / 6) ** power) * source for i, source in enumerate(sources)
        )
        torch.testing.assert_close(
            found[kind]["layer.weight"].double(), expected, rtol=1e-6, atol=1e-7
        )
        assert torch.equal(found[kind]["counts"], found["model"]["counts"])


def test_a_checkpoint_of_other_averages_is_refused(tmp_path: Path) -> None:
    job.save(tmp_path, engine().state())
    other = make_engine(
        Loss(),
        optim=OptimConfig(),
        engine=EngineConfig(),
        world=World(0, 1, 0, torch.device("cpu")),
        train=TrainConfig(steps=9, batch=4, precision="float32", ema_profiles=(0.05, 0.1)),
    )
    with pytest.raises(InputError, match=r"step-00000000: holds no ema-0\.1\.safetensors"):
        reading.resume(tmp_path, other.check, other.load)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    first = job.make("local", 0, job.ALONE)
    job.run(first, 0, job.HALF, job.ALONE)
    job.save(tmp_path, first.state())
    norms = job.run(first, job.HALF, job.STEPS, job.ALONE)
    again = job.make("local", 0, job.ALONE)
    reading.resume(tmp_path, again.check, again.load)
    assert job.run(again, job.HALF, job.STEPS, job.ALONE) == norms
    torch.testing.assert_close(values(again), values(first), rtol=0, atol=0)


def test_bfloat16_keeps_weights_and_gradients_float32() -> None:
    trained = engine(precision="bfloat16")
    trained.backward(trained.forward({"x": X})[0], 1)
    assert isinstance(trained, LocalEngine)
    assert {p.grad.dtype for p in trained.masters if p.grad is not None} == {torch.float32}
    trained.step(0.1, 0)
    exact = engine()
    exact.backward(exact.forward({"x": X})[0], 1)
    exact.step(0.1, 0)
    one, other = values(trained), values(exact)
    assert {value.dtype for value in one["model"].values()} == {torch.float32}
    assert not torch.equal(
        one["optimizer"]["exp_avg.layer.weight"], other["optimizer"]["exp_avg.layer.weight"]
    )


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "expected"),
    [
        (64, None, 1, (64, 1)),
        (64, None, 4, (16, 1)),
        (64, 8, 2, (8, 4)),
        (64, 8, 16, (4, 1)),
        (4, 8, 1, (4, 1)),
        (1, None, 1, (1, 1)),
    ],
)
def test_accumulation(batch: int, micro: int | None, ranks: int, expected: tuple[int, int]) -> None:
    train = TrainConfig(steps=1, batch=batch, micro_batch=micro)
    assert (micro_batch_size(train, ranks), accumulation(train, ranks)) == expected


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "near"),
    [
        (64, 5, 2, "60 or 70"),
        (64, None, 3, "63 or 66"),
        (2, None, 3, "nearest: 3"),
        (2, 8, 3, "nearest: 3"),
    ],
)
def test_batch_that_does_not_divide(batch: int, micro: int | None, ranks: int, near: str) -> None:
    with pytest.raises(InputError, match=rf"train\.batch = {batch}: .*{near}$"):
        accumulation(TrainConfig(steps=1, batch=batch, micro_batch=micro), ranks)


def test_deepspeed_config_is_computed_and_merged() -> None:
    train = TrainConfig(steps=1, batch=64, micro_batch=8)
    expert = EngineConfig(
        zero_stage=2, deepspeed={"zero_optimization": {"overlap_comm": True}, "comms_logger": {}}
    )
    config = deepspeed_config(OptimConfig(clip=0.5), train, expert, world_size=2, parameters=1000)
    assert config["gradient_accumulation_steps"] == 4 and config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": True,
        "reduce_bucket_size": 1024,
        "allgather_bucket_size": 1024,
    }
    assert config["comms_logger"] == {}


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"gradient_clipping": 2.0}, r"engine\.deepspeed\.gradient_clipping: .*optim\.clip"),
        ({"zero_optimization": {"stage": 3}}, r"zero_optimization\.stage: .*engine\.zero_stage"),
        ({"zero_optimization": 3}, r"zero_optimization = 3: must be a table; .*engine\.zero_stage"),
    ],
)
def test_deepspeed_table_may_not_set_what_others_own(table: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        deepspeed_config(OptimConfig(), TrainConfig(steps=1), EngineConfig(deepspeed=table), 1, 10)
