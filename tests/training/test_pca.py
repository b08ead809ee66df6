"""The start of RIAE's linear map: the principal components of training images, computed once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import RiaeConfig, RiaeRun
from r2id.config.batch_split import micro_batch_size
from r2id.data.stream import fetch_index
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.riae import RIAE
from r2id.training import pca
from r2id.training.loop import train
from r2id.training.tasks import RiaeTask, make_task
from tests.training.children import Ranks
from tests.training.configs import attention_config, riae_config


def pictures(count: int, *shape: int) -> Tensor:
    """Noise that is smooth, so that some components matter more than others."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(count, shape[0], shape[1] + 2, shape[2] + 2, generator=generator)
    return 2 * F.avg_pool2d(noise, 3, stride=1) - 1


def cells_of(images: Tensor, cell: int) -> np.ndarray:
    """The values of all cells, [cells, C·s²], with mirrored borders."""
    height, width = images.shape[2:]
    beyond = ((0, 0), (0, 0), (0, -height % cell), (0, -width % cell))
    padded = torch.from_numpy(np.pad(images.numpy(), beyond, mode="reflect"))
    cells = rearrange(padded, "b c (h i) (w j) -> (b h w) (c i j)", i=cell, j=cell)
    return cells.double().numpy()


def fit(
    images: Tensor, cell: int, components: int, batch: int = 7, lapped: bool = False
) -> dict[str, Tensor]:
    cells = len(cells_of(images, cell))
    return pca.fit_pca(images.split(batch), cell, components, cells, lapped)


def model_of(weights: dict[str, Tensor], cell: int, channels: int, lapped: bool = False) -> RIAE:
    components = len(weights["to_code.weight"])
    config = RiaeConfig(latent_channels=components, downsample=cell, width=16, lapped=lapped)
    torch.manual_seed(0)
    model = RIAE(config, channels)
    pca.start_from_pca(model, weights)
    return model.eval()


@pytest.mark.parametrize("size", [(9, 9), (10, 7), (2, 30)])
@pytest.mark.parametrize(("channels", "cell", "components"), [(2, 3, 5), (1, 4, 16), (3, 1, 2)])
def test_it_is_the_singular_value_decomposition(
    size: tuple[int, int], channels: int, cell: int, components: int
) -> None:
    images = pictures(40, channels, *size)
    weights = fit(images, cell, components)
    values = cells_of(images, cell)
    mean = values.mean(0)
    left, singular, right = np.linalg.svd(values - mean, full_matrices=False)
    best = (left[:, :components] * singular[:components]) @ right[:components] + mean
    to_code, from_code = (
        (weights[f"{name}.weight"].double().numpy(), weights[f"{name}.bias"].double().numpy())
        for name in ("to_code", "from_code")
    )
    codes = values @ to_code[0].T + to_code[1]
    np.testing.assert_allclose(codes @ from_code[0].T + from_code[1], best, atol=1e-4)
    spread = singular[:components] / np.sqrt(len(values))
    strong = spread > 2e-3 * spread[0]  # weaker ones are left weak
    np.testing.assert_allclose(codes.mean(0), 0, atol=1e-3)
    np.testing.assert_allclose(
        np.cov(codes.T, bias=True)[strong][:, strong], np.eye(strong.sum()), atol=5e-3
    )
    largest = np.take_along_axis(from_code[0], np.abs(from_code[0]).argmax(0)[None], 0)
    assert (largest > 0).all()


@pytest.mark.parametrize("size", [(12, 12), (11, 7), (1, 9)])
def test_an_untrained_model_is_the_analysis(size: tuple[int, int]) -> None:
    images, cell = pictures(60, 3, *size), 4
    weights = fit(images, cell, 6)
    model = model_of(weights, cell, 3)
    values = torch.from_numpy(cells_of(images, cell)).float()
    codes = F.linear(values, weights["to_code.weight"], weights["to_code.bias"])
    cells = F.linear(codes, weights["from_code.weight"], weights["from_code.bias"])
    grid = model.grid_for(size)
    expected = rearrange(
        cells, "(b h w) (c i j) -> b c (h i) (w j)", h=grid[0], w=grid[1], i=cell, j=cell
    )
    found = model.decode(model.encode(images), size)
    torch.testing.assert_close(found, expected[:, :, : size[0], : size[1]], atol=1e-5, rtol=1e-5)
    assert 0 < F.mse_loss(found, images) < images.var()


def test_a_lapped_model_starts_from_the_analysis_of_mixed_points() -> None:
    images, cell = pictures(300, 1, 16, 16), 4
    errors = []
    for lapped in (False, True):
        model = model_of(fit(images, cell, 3, lapped=lapped), cell, 1, lapped)
        latents = model.encode(images)
        torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(3), atol=0.01, rtol=0)
        torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(3), atol=0.01, rtol=0)
        errors.append(float(F.mse_loss(model.decode(latents, (16, 16)), images)))
    assert errors[1] < 0.95 * errors[0]


def test_more_channels_than_values_share_them_out_and_average_noise() -> None:
    images, cell = pictures(50, 1, 8, 8), 2
    model = model_of(fit(images, cell, 12), cell, 1)
    latents = model.encode(images)
    torch.testing.assert_close(model.decode(latents, (8, 8)), images, atol=1e-5, rtol=0)
    assert latents.square().mean() == pytest.approx(1, rel=1e-3)
    noisy = latents + 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    error = F.mse_loss(model.decode(noisy, (8, 8)), images)
    # A third of what it is with as many channels as values.
    assert error == pytest.approx(float(0.01 * images.var() * 4 / 12), rel=0.1)


def test_it_is_the_same_again_and_nearly_the_same_in_other_batches() -> None:
    images = pictures(40, 2, 9, 6)
    one, again, other = (fit(images, 3, 5, batch) for batch in (7, 7, 40))
    for name, value in one.items():
        assert torch.equal(again[name], value)
        torch.testing.assert_close(other[name], value, atol=1e-3, rtol=1e-3)


# What it takes


def test_it_reads_a_bounded_number_of_images() -> None:
    assert pca.image_limit([(28, 28)] * 60_000) == 4096
    assert pca.image_limit([(256, 256)] * 60_000) == 512
    assert pca.image_limit([(256, 256), (512, 256)] * 60_000) == 341
    assert pca.image_limit([(4000, 3000)] * 100) == 16


def test_of_many_cells_it_takes_some_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(64, 1, 24, 24)
    every = fit(images, 4, 3)
    monkeypatch.setattr(pca, "_CELLS", 500)
    some = fit(images, 4, 3)
    ratio = model_error(some, images) / model_error(every, images)
    assert 1 <= ratio < 1.02, "another sample of the same pictures"
    for name, value in fit(images, 4, 3).items():
        assert torch.equal(some[name], value), "the same ones again"
    # Of 2,304 cells one in five of each batch: nine times 51, and 8.
    with pytest.raises(InputError, match="the training images have 467;"):
        fit(images, 4, 600)


def test_the_cells_that_it_takes_are_of_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the number of cells is a multiple of the columns, every eighth of them black."""
    images = pictures(16, 1, 16, 16)
    images[..., ::8] = -1
    monkeypatch.setattr(pca, "_CELLS", images.numel() // 8)
    ((found,),) = fit(images, 1, 1)["from_code.weight"].square()
    assert float(found) == pytest.approx(float(images.var()), rel=0.15)


def model_error(weights: dict[str, Tensor], images: Tensor) -> float:
    model = model_of(weights, 4, 1)
    size = images.shape[2], images.shape[3]
    return float(F.mse_loss(model.decode(model.encode(images), size), images))


# What it refuses


@pytest.mark.parametrize(
    ("images", "components", "words"),
    [
        (torch.rand(1, 1, 8, 8), 4, ["riae.latent_channels = 4", " 4;", "start = 'random'"]),
        (torch.full((50, 1, 8, 8), 0.25), 4, ["one colour", "start = 'random'"]),
        (torch.full((50, 1, 8, 8), torch.nan), 4, ["not finite"]),
        (torch.full((50, 1, 8, 8), torch.inf), 4, ["not finite"]),
        (torch.zeros(0, 1, 8, 8), 4, ["have 0"]),
    ],
)
def test_what_it_cannot_use_is_one_clear_line(
    images: Tensor, components: int, words: list[str]
) -> None:
    with pytest.raises(InputError) as caught:
        pca.fit_pca([images] if len(images) else [], 4, components, 100, False)
    said = str(caught.value)
    assert "\n" not in said and all(word in said for word in words), said


# Runs


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What each analysis of a run found."""
    found: list[dict[str, Tensor]] = []
    plain = pca.fit_pca

    def fit_pca(*given: Any) -> dict[str, Tensor]:
        found.append(plain(*given))
        return found[-1]

    monkeypatch.setattr(pca, "fit_pca", fit_pca)
    return found


def started(config: RiaeRun) -> RIAE:
    """The model with which a new run's first step begins."""
    task = make_task(config, dist.init(), micro_batch_size(config.train, 1))
    task.start()
    assert isinstance(task.module.model, RIAE)
    return task.module.model.eval()


def test_a_run_begins_with_it_once(
    digits: Path, tmp_path: Path, fits: list[dict[str, Tensor]]
) -> None:
    config = riae_config(digits, tmp_path / "run", "train.steps=2")
    train(config)
    assert len(fits) == 1
    train(riae_config(digits, tmp_path / "run", "train.steps=4"))
    assert len(fits) == 1, "a resumed run goes on with what it has"
    train(riae_config(digits, tmp_path / "next", "train.steps=2", f"init_from={tmp_path / 'run'}"))
    assert len(fits) == 1, "so does one that begins with another's weights"
    first = started(config)
    assert len(fits) == 2
    for name, value in fits[0].items():
        assert torch.equal(fits[1][name], value) and torch.equal(first.state_dict()[name], value)


@pytest.mark.parametrize(
    ("make", "more"),
    [(riae_config, ["start=random"]), (riae_config, ["riae.linear=false"]), (attention_config, [])],
)
def test_runs_that_begin_at_random(
    make: Any, more: list[str], digits: Path, tmp_path: Path, fits: list[dict[str, Tensor]]
) -> None:
    train(make(digits, tmp_path / "run", "train.steps=1", *more))
    assert not fits


def test_streamed_images_are_the_same(
    digits: Path, tmp_path: Path, fits: list[dict[str, Tensor]]
) -> None:
    shutil.copytree(digits, tmp_path / "far")
    fetch_index(str(tmp_path / "far"), tmp_path / "near")
    started(riae_config(digits, tmp_path / "run"))
    started(riae_config(tmp_path / "near", tmp_path / "run", f"data.stream={tmp_path / 'far'}"))
    assert not list((tmp_path / "near").rglob("*.tar"))
    for name, value in fits[0].items():
        assert torch.equal(fits[1][name], value)


def test_whole_images_are_analysed_where_training_cuts_windows(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their number is limited by their own pixels, not by those of windows."""
    read: list[tuple[int, ...]] = []
    plain = pca.fit_pca

    def fit_pca(images: Any, *given: Any) -> dict[str, Tensor]:
        batches = list(images)
        read.extend(tuple(batch.shape) for batch in batches)
        return plain(batches, *given)

    monkeypatch.setattr(pca, "fit_pca", fit_pca)
    monkeypatch.setattr(pca, "_PIXELS", 100 * 8 * 8)
    started(riae_config(digits, tmp_path / "run", "data.window=[4, 4]"))
    assert sum(shape[0] for shape in read) == 100 and {shape[2:] for shape in read} == {(8, 8)}


def test_statistics_of_latents_read_a_bounded_number_of_pixels(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from r2id.training import tasks

    config = riae_config(digits, tmp_path / "run", "data.window=[4, 4]")
    task = make_task(config, dist.init(), 8)
    assert isinstance(task, RiaeTask) and isinstance(task.module.model, RIAE)
    model, seen = task.module.model.eval(), []
    plain = model.encode
    monkeypatch.setattr(model, "encode", lambda image: (seen.append(image.shape), plain(image))[1])
    monkeypatch.setattr(tasks, "_STATISTICS_PIXELS", 50 * 8 * 8)
    found = task.latent_statistics(model, torch.device("cpu"))
    assert sum(shape[0] for shape in seen) == 50 and {shape[2:] for shape in seen} == {(8, 8)}
    assert found["mean"].shape == found["std"].shape == (config.riae.latent_channels,)


def test_the_error_of_an_untrained_run_is_that_of_the_analysis(
    digits: Path, tmp_path: Path
) -> None:
    """Of digits, whose latents hold as many values as they have pixels, it is nothing."""
    config = riae_config(digits, tmp_path / "run", "riae.downsample=2")
    lossless = started(config)
    task = make_task(config, dist.init(), 8)
    assert isinstance(task, RiaeTask)
    images = next(task._training_images(200, 200))["image"]
    assert F.mse_loss(lossless.decode(lossless.encode(images), (8, 8)), images) < 1e-5
    few = started(riae_config(digits, tmp_path / "run", "riae.latent_channels=2"))
    values = cells_of(images, 2)
    variances = np.linalg.eigvalsh(np.cov(values.T, bias=True))
    error = F.mse_loss(few.decode(few.encode(images), (8, 8)), images)
    assert error == pytest.approx(variances[:2].sum() / 4, rel=0.05)


def test_attention_may_begin_with_it_too(
    digits: Path, tmp_path: Path, fits: list[dict[str, Tensor]]
) -> None:
    """Untrained, it is the analysis at the images' own size, and bicubic resizing at others."""
    few = ["riae.latent_channels=2", "riae.linear=true"]
    config = attention_config(digits, tmp_path / "run", *few)
    model = started(config)
    task = make_task(config, dist.init(), 8)
    assert isinstance(task, RiaeTask) and len(fits) == 1
    images = next(task._training_images(100, 100))["image"]
    settings = "riae.latent_channels=2", "riae.lapped=false"
    lattice = started(riae_config(digits, tmp_path / "run", *settings))
    latents, expected = model.encode(images), lattice.encode(images)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    for size in ((8, 8), (16, 12), (5, 8)):
        drawn, window = model.decode(latents, size), model.decode(latents, size, (1, 2, 4, 7))
        # Without the means that decoding on a lattice keeps.
        expected = lattice.parts.decoder.render(latents, size, native=(8, 8))
        torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(window, drawn[:, :, 1:4, 2:7], atol=1e-5, rtol=1e-5)
    task.module.model.load_state_dict(model.state_dict())
    exact = config.loss.model_copy(
        update={"jitter": 0.0, "decode_pixels": 64, "encode_cloud": 1.0, "latent_noise": 0.0}
    )
    task.module.config = exact
    loss, _ = task.module(images, torch.arange(100), 0)
    error = F.mse_loss(model.decode(latents, (8, 8)), images)
    assert float(loss.detach()) == pytest.approx(float(error), rel=1e-4)
    loss.backward()
    for name, weight in task.module.model.named_parameters():
        assert weight.grad is not None, name
    config = attention_config(digits, tmp_path / "trained", *few, "train.steps=60")
    train(config)
    trained = Codec.load(config.run).model
    assert F.mse_loss(trained.decode(trained.encode(images), (8, 8)), images) < 1.02 * error


def ranks_start(world: dist.World, shards: Path, folder: Path) -> tuple[int, list[float]]:
    """How many analyses a rank has made, and sums of the weights that it begins with."""
    calls = []
    plain = pca.fit_pca

    def fit_pca(*given: Any) -> dict[str, Tensor]:
        calls.append(given)
        return plain(*given)

    pca.fit_pca = fit_pca
    try:
        task = make_task(riae_config(shards, folder), world, 8)
        task.start()
    finally:
        pca.fit_pca = plain
    return len(calls), [float(p.double().sum()) for p in task.module.model.parameters()]


def test_one_rank_computes_it_for_all(ranks: Ranks, digits: Path, tmp_path: Path) -> None:
    (ours, first), (theirs, second) = ranks(ranks_start, digits, tmp_path / "run")
    assert (ours, theirs) == (1, 0)
    alone = started(riae_config(digits, tmp_path / "run"))
    names = [name for name, _ in alone.named_parameters()]
    for name, one, other in zip(names, first, second, strict=True):
        if name.startswith(("to_code", "from_code")):
            assert one == other == float(alone.state_dict()[name].double().sum()), name


def test_a_run_saves_the_weights_it_began_with(digits: Path, tmp_path: Path) -> None:
    """At a learning rate of nearly 0, what is saved is the analysis."""
    config = riae_config(
        digits, tmp_path / "run", "train.steps=1", "optim.lr=1e-12", "optim.lr_end=0"
    )
    train(config)
    saved, begun = Checkpoint.open(config.run).tensors("ema"), started(config).state_dict()
    for name in ("to_code.weight", "from_code.bias"):
        torch.testing.assert_close(saved[name], begun[name], atol=1e-6, rtol=0)
