"""What a training step of an RIAE on a lattice decodes, and compares it with."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from r2id.config import LossConfig, RiaeConfig
from r2id.images import resize
from r2id.models.cells import on_lattice
from r2id.models.riae import RIAE
from r2id.training import pca
from r2id.training.losses import windows
from r2id.training.losses.windows import WindowLoss

SMALL = RiaeConfig(
    latent_channels=4, downsample=4, width=16, encoder_blocks=1, decoder_blocks=1, features=4
)
INDEX = torch.tensor([5, 9, 2, 7])
STEP = 3


def made(channels: int = 1, **changes: Any) -> RIAE:
    """A model whose networks no longer correct by 0, as they do at the start."""
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update=changes), channels)
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(*shape[:2], shape[2] + 2, shape[3] + 2, generator=generator)
    return 2 * F.avg_pool2d(noise, 3, stride=1) - 1


def loss_of(model: RIAE, image: Tensor, step: int = STEP, **settings: Any) -> tuple[float, Any]:
    config = LossConfig(**({"magnify": 0.0} | settings))
    with torch.no_grad():
        loss, figures = WindowLoss(model, config, seed=0)(image, INDEX[: len(image)], step)
    return float(loss), figures


@pytest.mark.parametrize("size", [(12, 16), (13, 9), (3, 2), (1, 1)])
def test_a_plain_step_decodes_images_at_their_own_size(size: tuple[int, int]) -> None:
    model, image = made(2), images(4, 2, *size)
    decoded = model.decode(model.encode(image), size)
    loss, figures = loss_of(model, image)
    assert loss == pytest.approx(float(F.mse_loss(decoded, image)), rel=1e-4)
    assert float(figures["mse"]) == loss
    rms = model.encode(image).square().mean().sqrt()
    assert float(figures["latent_rms"]) == pytest.approx(float(rms), rel=1e-4)


@pytest.mark.parametrize("scale", [0.5, 0.8])
def test_a_step_of_magnify_encodes_smaller_copies(scale: float) -> None:
    model, image = made(), images(4, 1, 13, 20)
    small = round(13 * scale), round(20 * scale)
    with torch.no_grad():
        decoded = model.parts.decoder.render(model.encode(resize(image, small)), (13, 20), small)
    loss, _ = loss_of(model, image, magnify=1.0, magnify_scales=(scale, scale))
    assert loss == pytest.approx(float(F.mse_loss(decoded, image)), rel=1e-4)
    assert loss != pytest.approx(loss_of(model, image)[0], rel=1e-2)


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_step_of_equivariance_resizes_latents_and_images(scale: float) -> None:
    """What is beyond an image's border is repeated, so that both hold the same cells."""
    model, image = made(), images(4, 1, 14, 24)
    grid = round(4 * scale), round(6 * scale)
    latents = resize(model.encode(image), grid)
    size = 4 * grid[0], 4 * grid[1]
    truth = resize(on_lattice(image, (14, 24), 4), size)
    loss, _ = loss_of(model, image, equivariance=1.0, equivariance_scales=(scale, scale))
    expected = F.mse_loss(model.decode(latents, size), truth)
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_steps_are_of_each_kind_as_often_as_the_settings_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds: Counter[str] = Counter()
    plain = windows.random_size

    def noted(size: Any, scales: Any, *key: int) -> Any:
        kinds["magnify" if scales == (0.5, 1.0) else "equivariance"] += 1
        return plain(size, scales, *key)

    monkeypatch.setattr(windows, "random_size", noted)
    model, image = made(), images(1, 1, 8, 8)
    for step in range(1, 401):
        loss_of(model, image, step, magnify=0.5, equivariance=0.2)
    assert kinds["magnify"] == pytest.approx(200, abs=40)
    assert kinds["equivariance"] == pytest.approx(80, abs=32)


def test_random_sizes_reach_from_end_to_end_and_both_sides_have_their_own() -> None:
    sizes = {windows.random_size((20, 40), (0.5, 2.0), 0, step) for step in range(400)}
    assert {min(h for h, _ in sizes), max(h for h, _ in sizes)} == {10, 40}
    assert {min(w for _, w in sizes), max(w for _, w in sizes)} == {20, 80} and len(sizes) == 64
    again = windows.random_size((20, 40), (0.5, 2.0), 0, 7)
    assert again == windows.random_size((20, 40), (0.5, 2.0), 0, 7)


SETTINGS = [
    {},
    {"magnify": 1.0},
    {"equivariance": 1.0},
    {"latent_noise": 0.5},
    {"window": (5, 7)},
    {"texture": 1.0, "pixel": "l1"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_loss_depends_on_step_and_sample_alone(settings: dict[str, Any]) -> None:
    model, image = made(), images(4, 1, 13, 20)
    config = LossConfig(**({"magnify": 0.0} | settings))
    loss = WindowLoss(model, config, seed=3)
    with torch.no_grad():
        whole, _ = loss(image, INDEX, STEP)
        halves = [loss(image[part], INDEX[part], STEP)[0] for part in (slice(2), slice(2, 4))]
        again, _ = loss(image, INDEX, STEP)
        others = {float(loss(image, INDEX, step)[0]) for step in range(4, 9)}
    torch.testing.assert_close(whole, sum(halves) / 2, rtol=1e-5, atol=1e-6)
    assert torch.equal(again, whole)
    drawn = set(settings) & {"magnify", "equivariance", "latent_noise", "window"}
    assert (others != {float(whole)}) == bool(drawn)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("changes", [{}, {"linear": False}, {"features": 0}], ids=str)
def test_every_step_gives_every_weight_a_gradient(
    changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Be it 0: engines treat weights without one differently."""
    model, image = made(**changes), images(4, 1, 13, 20)
    loss, _ = WindowLoss(model, LossConfig(**({"magnify": 0.0} | settings)), 0)(image, INDEX, STEP)
    loss.backward()
    idle = []
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        if not weight.grad.any():
            idle.append(name)
    between = "magnify" in settings  # smaller pixels than points
    assert all(name.startswith(("fine.look", "fine.between")) for name in idle)
    assert not (between and idle)


def test_noise_has_its_strength() -> None:
    loss = WindowLoss(made(), LossConfig(latent_noise=0.3), seed=0)
    latents, keys = torch.ones(4, 4, 30, 30), torch.arange(4)
    noise = loss._disturbed(latents, keys) - latents
    assert float(noise.std()) == pytest.approx(0.3, rel=0.05) and abs(float(noise.mean())) < 0.02
    assert torch.equal(WindowLoss(made(), LossConfig(), 0)._disturbed(latents, keys), latents)


def test_a_window_is_a_part_of_the_whole_picture() -> None:
    """Over many steps every pixel is seen; what is decoded equals that part of the whole."""
    model, image = made(), images(2, 1, 13, 20)
    error = (model.decode(model.encode(image), (13, 20)) - image).square()
    loss = WindowLoss(model, LossConfig(magnify=0.0, window=(5, 7)), seed=0)
    seen = torch.zeros(13, 20)
    for step in range(200):
        rows, columns = loss._window((13, 20), step)
        assert rows.stop - rows.start == 5 and columns.stop - columns.start == 7
        seen[rows, columns] += 1
        if step < 10:
            value, _ = loss_of(model, image, step, window=(5, 7))
            assert value == pytest.approx(float(error[:, :, rows, columns].mean()), rel=1e-4)
    assert seen.min() > 0
    whole, _ = loss_of(model, image, window=(100, 100))
    assert whole == pytest.approx(float(error.mean()), rel=1e-4)


def test_a_new_model_s_loss_is_that_of_the_analysis_it_starts_from() -> None:
    image = images(16, 3, 12, 12)
    weights = pca.fit_pca(image.split(4), 4, 4, 16 * 9, lapped=False)
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update={"lapped": False}), 3)
    pca.start_from_pca(model, weights)
    cells = on_lattice(image, (12, 12), 4).unfold(2, 4, 4).unfold(3, 4, 4)
    values = cells.permute(0, 2, 3, 1, 4, 5).reshape(-1, 48).double()
    variances = torch.linalg.eigvalsh(values.T.cov(correction=0))
    with torch.no_grad():
        loss, _ = WindowLoss(model, LossConfig(magnify=0.0), 0)(image, torch.arange(16), STEP)
    assert float(loss) == pytest.approx(float(variances[:-4].sum() / 48), rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "left"),
    [({}, 0.05), ({"magnify": 0.3, "equivariance": 0.2}, 0.1), ({"window": (8, 8)}, 0.1)],
    ids=str,
)
def test_overfits_one_batch(settings: dict[str, Any], left: float) -> None:
    torch.manual_seed(0)
    model, image = RIAE(SMALL, 3), images(4, 3, 13, 16)
    loss = WindowLoss(model, LossConfig(**({"magnify": 0.0} | settings)), seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(300):
        value, _ = loss(image, torch.arange(4), step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    error = F.mse_loss(model.decode(model.encode(image), (13, 16)), image)
    assert error < left * image.var()
