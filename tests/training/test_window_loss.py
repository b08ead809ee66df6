"""The terms of the loss of windows: what each is, when it begins, and for whom it has gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r2id.config import LossConfig, RiaeConfig, TrainConfig, load_config
from r2id.errors import InputError
from r2id.models.riae import RIAE
from r2id.training.blocks import prepare_blocks
from r2id.training.losses.discriminator import Discriminator, adversarial_terms, squared_gradient
from r2id.training.losses.pixel import reconstruction_loss
from r2id.training.losses.spectrum import spectrum_loss
from r2id.training.losses.ssim import ssim_loss
from r2id.training.losses.windows import WindowLoss, texture_loss

ONE = (1.0, 1.0)
SIZES = [(1, 1), (1, 9), (3, 2), (5, 6), (17, 12)]


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def discriminator(channels: int = 2, width: int = 4) -> Discriminator:
    """One that is not at its start, where residuals are zero."""
    torch.manual_seed(0)
    network = Discriminator(channels, width)
    for block in network.blocks:
        nn.init.normal_(block.second.weight, std=0.3)
    return network


def window_loss(channels: int = 1, **loss: Any) -> WindowLoss:
    torch.manual_seed(0)
    config = RiaeConfig(latent_channels=3, downsample=2.0, width=16)
    return WindowLoss(RIAE(config, channels), LossConfig(**{"magnify": 0.0} | loss), seed=0)


# SSIM


@pytest.mark.parametrize("size", SIZES)
def test_ssim_compares_brightness_as_published(size: tuple[int, int]) -> None:
    """Of flat pictures, (2ab + c) / (a² + b² + c) is left, with c = (0.01·2)² and values from 0."""
    one, other = torch.full((2, 3, *size), -0.5), torch.full((2, 3, *size), 0.25)
    expected = 1 - (2 * 0.5 * 1.25 + 4e-4) / (0.5**2 + 1.25**2 + 4e-4)
    # In float32 the variance of a flat picture is not quite 0.
    assert float(ssim_loss(one, other)) == pytest.approx(expected, abs=5e-4)
    assert float(ssim_loss(one, one)) == pytest.approx(0, abs=1e-4)


def test_ssim_compares_structure() -> None:
    """Of the negative of noise around mid-grey, covariance is minus variance."""
    truth = pictures(2, 1, 32, 32)
    assert float(ssim_loss(truth, truth)) == pytest.approx(0, abs=1e-6)
    assert float(ssim_loss(-truth, truth)) > 1.5
    blurred = torch.nn.functional.avg_pool2d(truth, 3, 1, 1)
    assert 0.1 < float(ssim_loss(blurred, truth)) < 0.9


def test_ssim_is_not_of_bfloat16_under_autocast() -> None:
    one, other = pictures(1, 1, 16, 16), pictures(1, 1, 16, 16, seed=1) * 0.01
    with torch.autocast("cpu", torch.bfloat16):
        found = ssim_loss(one, other)
    assert torch.equal(found, ssim_loss(one, other))


# Spectrum


def test_spectrum_counts_power_wherever_the_details_are() -> None:
    """Half the power at every frequency costs 2 − ln 2 − 1, and a mirrored picture nothing."""
    truth = pictures(3, 2, 24, 40)
    half = float(spectrum_loss(0.5**0.5 * truth, truth))
    assert half == pytest.approx(1 - math.log(2), rel=1e-2)
    assert float(spectrum_loss(truth.flip(3), truth)) == pytest.approx(0, abs=1e-6)
    blurred = torch.nn.functional.avg_pool2d(truth, 3, 1, 1).requires_grad_()
    loss = spectrum_loss(blurred, truth)
    (slope,) = torch.autograd.grad(loss, blurred)
    assert spectrum_loss(blurred.detach() - 0.1 * slope, truth) < loss


def test_spectrum_is_best_at_the_mean_of_what_may_be_true() -> None:
    one = pictures(1, 1, 16, 16)
    truth = torch.cat([one, 3 * one])  # powers of 1 and 9
    losses = {
        power: float(spectrum_loss((power**0.5 * one).expand(2, -1, -1, -1), truth))
        for power in (3.0, 4.0, 4.8, 5.0, 5.2, 6.0, 9.0)
    }
    assert min(losses, key=lambda power: losses[power]) == 5.0


def test_spectrum_is_each_pictures_own() -> None:
    """The loss of a batch is the mean of that of its pictures, however they are divided."""
    decoded, truth = pictures(4, 1, 16, 12), pictures(4, 1, 16, 12, seed=1)
    parts = [spectrum_loss(*part) for part in zip(decoded.split(1), truth.split(1), strict=True)]
    torch.testing.assert_close(spectrum_loss(decoded, truth), torch.stack(parts).mean())


def test_spectrum_does_not_count_what_rounding_adds() -> None:
    """A flat picture has no details, and one of rounding errors few."""
    flat = torch.zeros(2, 3, 32, 32)
    rounding = pictures(2, 3, 32, 32) / 255
    assert float(spectrum_loss(flat, flat)) == 0
    # Half of what is compared is the rounding, and half what is added to both.
    assert float(spectrum_loss(rounding, flat)) == pytest.approx(math.log(2) - 0.5, rel=0.1)
    assert float(spectrum_loss(0.1 * rounding, flat)) < 1e-3


def test_spectrum_is_not_of_bfloat16_under_autocast() -> None:
    one, other = pictures(1, 1, 16, 16), pictures(1, 1, 16, 16, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = spectrum_loss(one, other)
    assert torch.equal(found, spectrum_loss(one, other))


# Discriminator


class Linear(nn.Module):
    """Judges each pixel by a weighted sum of its colours."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor, _pixel: tuple[float, float]) -> Tensor:
        return (images * self.weight[:, None, None]).sum(1, keepdim=True)


def test_blocks_start_as_the_identity() -> None:
    for block in Discriminator(2, 4).blocks:
        x = pictures(1, block.first.in_channels, 3, 5)
        assert torch.equal(block(x), x)


def test_terms_of_a_linear_discriminator() -> None:
    """The gradient of a pixel's judgement is the weights themselves."""
    network = Linear([0.5, -2.0])
    decoded, truth = pictures(3, 2, 5, 4), pictures(3, 2, 5, 4, seed=1)
    decoded.requires_grad_()
    terms = adversarial_terms(network, decoded, truth, ONE)
    lead = (network(decoded, ONE) - network(truth, ONE)).detach()
    assert float(terms.generator.detach()) == pytest.approx(float((1 + (-lead).exp()).log().mean()))
    assert float(terms.discriminator) == pytest.approx(float((1 + lead.exp()).log().mean()))
    for penalty in (terms.r1, terms.r2):
        assert float(penalty) == pytest.approx(0.5**2 + 2.0**2)
        (gradient,) = torch.autograd.grad(penalty, network.weight, retain_graph=True)
        torch.testing.assert_close(gradient, 2 * network.weight.detach())
    (gradient,) = torch.autograd.grad(terms.generator, decoded)
    slope = -torch.sigmoid(-lead) / lead.numel()
    torch.testing.assert_close(gradient, slope * network.weight.detach()[:, None, None])


def test_each_side_takes_the_other_as_it_is() -> None:
    network, decoded = discriminator(), pictures(2, 2, 6, 6).requires_grad_()
    terms = adversarial_terms(network, decoded, pictures(2, 2, 6, 6, seed=1), ONE)
    weights = list(network.parameters())
    for term in (terms.discriminator, terms.r1, terms.r2):
        (found,) = torch.autograd.grad(term, decoded, retain_graph=True, allow_unused=True)
        assert found is None
        gradients = torch.autograd.grad(term, weights, retain_graph=True, allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)
        assert any(gradient is not None and bool(gradient.any()) for gradient in gradients)
    (found,) = torch.autograd.grad(terms.generator, decoded, retain_graph=True)
    assert bool(found.any())
    found = torch.autograd.grad(terms.generator, weights, allow_unused=True)
    assert all(gradient is None for gradient in found)


def test_penalties_are_differentiated_through_the_gradient() -> None:
    """By central differences, which are exact for the last weights: the penalty is quadratic."""
    network, real = discriminator(), pictures(2, 2, 7, 6)

    def penalty() -> Tensor:
        image = real.clone().requires_grad_()
        return squared_gradient(network(image, ONE), image)

    weight = network.judge.weight
    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = pictures(*weight.shape, seed=2)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(sign * direction)
        values.append(float(penalty()))
        with torch.no_grad():
            weight.sub_(sign * direction)
    assert float((gradient * direction).sum()) == pytest.approx(
        (values[0] - values[1]) / 2, rel=1e-3
    )


def test_penalties_are_at_real_and_at_decoded_pictures() -> None:
    network, decoded, truth = discriminator(), pictures(2, 2, 7, 6), pictures(2, 2, 7, 6, seed=1)
    terms = adversarial_terms(network, decoded, truth, ONE)
    r1, r2 = (
        squared_gradient(network(image, ONE), image)
        for image in (truth.clone().requires_grad_(), decoded.clone().requires_grad_())
    )
    torch.testing.assert_close((terms.r1, terms.r2), (r1, r2))
    assert float(r1) != pytest.approx(float(r2), rel=1e-2)


def test_penalties_do_not_grow_with_the_picture() -> None:
    network = discriminator()
    small, large = (
        float(squared_gradient(network(image, ONE), image))
        for image in (torch.zeros(1, 2, side, side, requires_grad=True) for side in (64, 128))
    )
    assert large == pytest.approx(small, rel=0.3)


def test_halves_of_a_batch_have_the_mean_of_its_terms() -> None:
    network, decoded, truth = discriminator(), pictures(4, 2, 6, 5), pictures(4, 2, 6, 5, seed=1)
    whole = adversarial_terms(network, decoded, truth, ONE)
    halves = [
        adversarial_terms(network, *pair, ONE)
        for pair in zip(decoded.split(2), truth.split(2), strict=True)
    ]
    for name in whole._fields:
        parts = [float(getattr(half, name)) for half in halves]
        assert sum(parts) / 2 == pytest.approx(float(getattr(whole, name)), rel=1e-5)


def test_it_is_float32_under_autocast_and_needs_no_gradients_around_it() -> None:
    network, decoded, truth = discriminator(), pictures(2, 2, 6, 5), pictures(2, 2, 6, 5, seed=1)
    expected = adversarial_terms(network, decoded, truth, ONE)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, adversarial_terms(network, decoded, truth, ONE), expected))
    with torch.no_grad():
        assert all(map(torch.equal, adversarial_terms(network, decoded, truth, ONE), expected))


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_size_are_judged(size: tuple[int, int]) -> None:
    places = [math.ceil(side / 8) for side in size]
    assert discriminator()(pictures(2, 2, *size), ONE).shape == (2, 1, *places)


def test_it_is_told_how_large_pixels_are() -> None:
    network, images = discriminator(), pictures(1, 2, 8, 8)
    assert torch.equal(network(images, ONE), network(images, ONE))
    for pixel in ((0.5, 1.0), (1.0, 0.5)):
        assert not torch.allclose(network(images, ONE), network(images, pixel))


def test_steps_tell_it_how_much_smaller_the_encoded_images_were() -> None:
    loss, told = window_loss(discriminator=0.1, magnify=1.0, magnify_scales=(0.5, 0.5)), set()
    assert loss.discriminator is not None
    loss.discriminator.register_forward_pre_hook(lambda _, given: told.add(given[1]))
    loss(pictures(2, 1, 5, 16), torch.arange(2), step=0)
    assert told == {(2 / 5, 8 / 16)}


# Texture


@pytest.mark.parametrize("size", [(4, 7), (1, 9), (9, 1)])
def test_texture_of_ramps(size: tuple[int, int]) -> None:
    """Neighbours along an error's slope differ by it, those across it do not; the mean of both.

    A single row has no neighbours above or below, a single column none beside.
    """
    truth, slope, directions = pictures(2, 3, *size), 0.25, sum(side > 1 for side in size)
    down, right = (slope * torch.arange(side) for side in size)
    for ramp, length in ((down[:, None], size[0]), (right, size[1])):
        found = texture_loss(truth + ramp, truth, "mse")
        expected = slope**2 / directions if length > 1 else 0
        assert float(found) == pytest.approx(expected, rel=1e-4)


# All terms of the loss


def test_the_loss_is_the_weighted_sum_of_its_terms() -> None:
    loss = window_loss(
        pixel="charbonnier",
        texture=0.5,
        ssim=0.2,
        spectrum=0.3,
        discriminator=0.1,
        discriminator_penalty=3.0,
        discriminator_width=4,
    )
    total, figures = loss(pictures(2, 1, 8, 8), torch.arange(2), step=0)
    weights = {
        "pixel": 1.0,
        "texture": 0.5,
        "ssim": 0.2,
        "spectrum": 0.3,
        "generator": 0.1,
        "discriminator": 0.1,
        "r1": 0.15,
        "r2": 0.15,
    }
    assert set(figures) == {*weights, "mse", "latent_rms"}
    expected = sum(weight * float(figures[name]) for name, weight in weights.items())
    assert float(total) == pytest.approx(expected, rel=1e-6)
    assert not any(figure.requires_grad for figure in figures.values())


def test_terms_are_of_the_decoded_window() -> None:
    loss, image = window_loss(texture=0.5, ssim=0.2, spectrum=0.3), pictures(2, 1, 8, 6)
    _, figures = loss(image, torch.arange(2), step=0)
    decoded = loss.model.decode(loss.model.encode(image), (8, 6))
    for name, expected in {
        "pixel": reconstruction_loss(decoded, image, "mse"),
        "texture": texture_loss(decoded, image, "mse"),
        "ssim": ssim_loss(decoded, image),
        "spectrum": spectrum_loss(decoded, image),
    }.items():
        assert float(figures[name]) == pytest.approx(float(expected), rel=1e-4)


def test_a_discriminator_begins_at_its_step() -> None:
    loss = window_loss(discriminator=0.1, discriminator_start=3, discriminator_width=4)
    assert loss.discriminator is not None
    image, index = pictures(2, 1, 8, 8), torch.arange(2)
    for step in (2, 3):
        loss.zero_grad(set_to_none=True)
        total, figures = loss(image, index, step=step)
        total.backward()
        begun = step == 3
        assert ("generator" in figures) == begun
        assert (float(total.detach()) != float(figures["pixel"])) == begun
        gradients = [weight.grad for weight in loss.discriminator.parameters()]
        assert all(gradient is not None for gradient in gradients), "or engines would differ"
        assert any(bool(gradient.any()) for gradient in gradients if gradient is not None) == begun


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_any_size_have_finite_gradients(size: tuple[int, int], precision: str) -> None:
    loss = window_loss(
        texture=0.5, ssim=0.2, spectrum=0.3, discriminator=0.1, discriminator_width=4
    )
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        total, _ = loss(pictures(2, 1, *size), torch.arange(2), step=0)
    total.backward()
    gradients = [weight.grad for weight in loss.parameters() if weight.grad is not None]
    assert gradients and all(gradient.isfinite().all() for gradient in gradients)


def test_recomputed_activations_give_the_same_gradients() -> None:
    found = []
    for chosen in ("none", "all"):
        loss = window_loss(ssim=0.2, discriminator=0.1, discriminator_width=4)
        prepare_blocks(
            loss.model.blocks(),
            TrainConfig(steps=1, activation_checkpointing=chosen),
            torch.device("cpu"),
        )
        loss(pictures(2, 1, 8, 6), torch.arange(2), step=0)[0].backward()
        found.append({name: p.grad for name, p in loss.named_parameters() if p.grad is not None})
    assert any(name.startswith("discriminator.") for name in found[0])
    torch.testing.assert_close(found[1], found[0])


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["riae.kind=attention", "loss.ssim=0.1"], r"loss\.ssim = 0\.1.*'attention'"),
        (["riae.kind=attention", "loss.spectrum=0.1"], r"loss\.spectrum = 0\.1.*'attention'"),
        (["riae.kind=attention", "loss.discriminator=0.1"], r"loss\.discriminator = 0\.1"),
        (["loss.discriminator=0.1", "engine.zero_stage=3"], r"loss\.discriminator.*zero_stage 3"),
        (
            ["loss.discriminator=0.1", "engine.zero_stage=2", "train.precision=bfloat16_weights"],
            r"loss\.discriminator.*bfloat16_weights",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    settings: list[str], words: str, tmp_path: Path
) -> None:
    config = tmp_path / "riae.toml"
    config.write_text('stage = "riae"\nrun = "r"\n[data]\nshards = "d"\n[train]\nsteps = 1\n')
    with pytest.raises(InputError, match=words):
        load_config(config, settings)
