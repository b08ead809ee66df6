"""R2ID: any grid, conditions that matter, and a start from zero."""

import pytest
import torch
from pydantic import ValidationError

from r2id.config import DiffusionConfig, R2idConfig
from r2id.diffusion.denoising import draw_times
from r2id.models.r2id import R2ID
from r2id.training.losses.r2id import R2idLoss

SMALL = R2idConfig(width=32, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0.0)


CONDITIONINGS = pytest.mark.parametrize("conditioning", ["context", "cross"])


def build(seed=0, conditioning="context"):
    torch.manual_seed(seed)
    return R2ID(SMALL.model_copy(update={"conditioning": conditioning}), channels=4, classes=3)


def trained(model):
    """Gates open, so that every path matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@CONDITIONINGS
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (3, 8)])
def test_any_grid(grid, conditioning):
    model = trained(build(conditioning=conditioning))
    out = model(torch.randn(2, 4, *grid), torch.tensor([0.3, 0.9]), torch.tensor([-1, 2]))
    assert out.shape == (2, 4, *grid) and out.dtype == torch.float32 and out.isfinite().all()


def test_starts_by_predicting_zero():
    assert not build()(torch.randn(2, 4, 3, 3), torch.full((2,), 0.5), torch.tensor([0, 1])).any()


@pytest.mark.parametrize(
    ("objective", "schedule", "expected"),
    [("epsilon", "cosine", 1.0), ("v", "cosine", 1.0), ("flow", "flow", 2.0)],
)
def test_loss_at_the_start_is_the_target_s_variance(objective, schedule, expected):
    """Normalised data and noise: E|ε|² = 1, E|v|² = α² + σ² = 1, E|ε − x₀|² = 2."""
    loss = R2idLoss(
        build(), DiffusionConfig(objective=objective, schedule=schedule), base_side=4.0, seed=0
    )
    value, _ = loss(
        torch.randn(512, 4, 4, 4), torch.zeros(512, dtype=torch.int64), torch.arange(512), step=0
    )
    assert float(value) == pytest.approx(expected, rel=0.05)


@CONDITIONINGS
def test_condition_and_time_matter(conditioning):
    model, x = trained(build(conditioning=conditioning)), torch.randn(1, 4, 3, 3)
    half = torch.tensor([0.5])
    outs = [
        model(x, half, torch.tensor([0])),
        model(x, half, torch.tensor([1])),
        model(x, half, torch.tensor([-1])),
        model(x, torch.tensor([0.6]), torch.tensor([0])),
    ]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(outs[i], outs[j], atol=1e-4)


@CONDITIONINGS
def test_conditions_together_equal_conditions_alone(conditioning):
    model, x, noise = (
        trained(build(conditioning=conditioning)),
        torch.randn(2, 4, 3, 5),
        torch.tensor([0.2, 0.7]),
    )
    labels = torch.tensor([[0, 2], [-1, -1]])
    together = model.predict(x, noise, labels)
    for row, out in zip(labels, together, strict=True):
        torch.testing.assert_close(model(x, noise, row), out, atol=1e-5, rtol=1e-4)


@CONDITIONINGS
def test_the_condition_encoder_learns(conditioning):
    """Defect 2 of the original: its class tokens never got a gradient."""
    model = trained(build(conditioning=conditioning)).train()
    loss = R2idLoss(model, DiffusionConfig(), base_side=3.0, seed=0)
    loss(torch.randn(8, 4, 3, 3), torch.arange(8) % 3, torch.arange(8), step=0)[0].backward()
    assert model.condition.embedding.weight.grad.abs().sum(1).gt(0).sum() >= 3


def test_every_parameter_gets_a_gradient():
    model = trained(build()).train()
    loss = R2idLoss(model, DiffusionConfig(condition_dropout=0.5), base_side=3.0, seed=0)
    loss(torch.randn(8, 4, 3, 3), torch.arange(8) % 3, torch.arange(8), step=0)[0].backward()
    assert [
        name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_loss_depends_on_step_and_sample_alone():
    loss = R2idLoss(trained(build()), DiffusionConfig(), base_side=3.0, seed=1)
    latent, label, index = (
        torch.randn(4, 4, 3, 3),
        torch.tensor([0, 1, 2, 0]),
        torch.tensor([4, 8, 1, 3]),
    )
    whole, _ = loss(latent, label, index, step=2)
    halves = [
        loss(latent[part], label[part], index[part], step=2)[0]
        for part in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(whole, (halves[0] + 3 * halves[1]) / 4)


def test_overfits_one_batch():
    """Four fixed latents, one class each: the velocity at a random time becomes predictable."""
    torch.manual_seed(0)
    model = R2ID(SMALL.model_copy(update={"width": 64, "jitter": 0.0}), 4, 4)
    loss = R2idLoss(
        model,
        DiffusionConfig(objective="flow", schedule="flow", condition_dropout=0.0),
        3.0,
        seed=0,
    )
    latents = torch.randn(4, 4, 3, 3).repeat(16, 1, 1, 1)
    labels, index = torch.arange(64) % 4, torch.arange(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    values = []
    for step in range(200):
        value, _ = loss(latents, labels, index, step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-20:]) / 20 < 0.35 * values[0]


@pytest.mark.parametrize("sampling", ["uniform", "logit_normal"])
def test_times_are_inside_and_centred(sampling):
    times = draw_times(torch.arange(20000), sampling)
    assert times.min() > 0 and times.max() < 1 and times.mean() == pytest.approx(0.5, abs=0.01)
    assert times.std() == pytest.approx(
        {"uniform": 12**-0.5, "logit_normal": 0.2083}[sampling], rel=0.02
    )


def test_in_context_the_condition_reaches_tokens_by_attention_and_by_modulation():
    """Each of the two ways alone makes a difference."""
    model, x, half = trained(build()), torch.randn(1, 4, 3, 3), torch.tensor([0.5])
    labels = [torch.tensor([label]) for label in (0, 1)]
    with torch.no_grad():
        modulated = model.condition_in.weight.clone()
        model.condition_in.weight.zero_()
        one, other = (model(x, half, label) for label in labels)
        assert not torch.allclose(one, other, atol=1e-4)
        model.condition_in.weight.copy_(modulated)
        for block in model.decoder:
            block.attention.out.weight.zero_()
        one, other = (model(x, half, label) for label in labels)
        assert not torch.allclose(one, other, atol=1e-4)


def test_other_attention_takes_cross_conditioning():
    assert R2idConfig(attention=["axial"]).conditioning == "cross"
    assert R2idConfig(attention=["full"]).conditioning == "context"
    with pytest.raises(ValueError, match=r"conditioning = 'context': .*must be 'cross'"):
        R2idConfig(attention=("full", "tiled"), conditioning="context")
    for wrong in (3, "axial", None):  # no kinds at all are an error of attention, not of this
        with pytest.raises(ValidationError, match=r"attention\n"):
            R2idConfig(attention=wrong)
