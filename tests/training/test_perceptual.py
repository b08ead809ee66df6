"""The perceptual term: networks from files, their distances, and files that hold none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from r2id.config import LossConfig, RiaeConfig, RiaeRun, load_config
from r2id.errors import InputError
from r2id.models.riae import RIAE
from r2id.training.loop import train
from r2id.training.losses.perceptual import PerceptualLoss
from r2id.training.losses.windows import WindowLoss
from r2id.training.planner import memory
from r2id.training.workload import Dimensions, Workload, image_cost


class Colours(nn.Module):
    """Features that are the colours, as maps, as tokens, and of the first pixel alone."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x, x.flatten(2).transpose(1, 2), x[:, :, 0, 0]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 8, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = torch.tanh(self.first(x))
        return [x, self.second(x)]


class Fixed(nn.Module):
    """Takes pictures of 24×24 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 3, 24, 24)


class Named(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": x}


class Joined(nn.Module):
    """One row of features for the whole batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True)


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.uint8).to(torch.float32)


class Overflowing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0


@pytest.fixture
def script(tmp_path: Path) -> Callable[[nn.Module], Path]:
    def write(network: nn.Module) -> Path:
        file = tmp_path / f"{type(network).__name__}.pt"
        torch.jit.script(network).save(str(file))
        return file

    return write


def vgg_tensors() -> dict[str, Tensor]:
    """Weights by torchvision's names, drawn so that no layer dies out."""
    generator, tensors, before, number = torch.Generator().manual_seed(0), {}, 3, 0
    for widths in ([64] * 2, [128] * 2, [256] * 3, [512] * 3, [512] * 3):
        for width in widths:
            std = (2 / (9 * before)) ** 0.5
            weight = std * torch.randn(width, before, 3, 3, generator=generator)
            tensors[f"features.{number}.weight"] = weight
            tensors[f"features.{number}.bias"] = 0.1 * torch.randn(width, generator=generator)
            before, number = width, number + 2
        number += 1
    return tensors


def lpips_tensors() -> dict[str, Tensor]:
    """The same by the names of LPIPS, with weights of the features."""
    ends, tensors = (4, 9, 16, 23, 30), {}
    for name, tensor in vgg_tensors().items():
        number, kind = name.split(".")[1:]
        level = next(level for level, end in enumerate(ends, 1) if int(number) < end)
        tensors[f"net.slice{level}.{number}.{kind}"] = tensor
    generator = torch.Generator().manual_seed(1)
    for level, width in enumerate((64, 128, 256, 512, 512)):
        tensors[f"lin{level}.model.1.weight"] = torch.rand(1, width, 1, 1, generator=generator)
    return tensors


def vgg_features(images: Tensor) -> list[Tensor]:
    """What VGG16 makes of images before each pool, written out."""
    tensors, found = vgg_tensors(), []
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    x, number = ((images + 1) / 2 - mean) / std, 0
    for layers in (2, 2, 3, 3, 3):
        for _ in range(layers):
            weight, bias = (tensors[f"features.{number}.{kind}"] for kind in ("weight", "bias"))
            x, number = F.relu(F.conv2d(x, weight, bias, padding=1)), number + 2
        found.append(x)
        x, number = F.max_pool2d(x, 2), number + 1
    return found


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 1


def test_distance_is_that_of_directions(script: Callable[[nn.Module], Path]) -> None:
    """Red is as far from green as two directions at a right angle, however bright they are."""
    loss = PerceptualLoss(script(Colours()))
    red, green = torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4)
    red[:, 0], green[:, 1] = 0.5, 1.0
    assert float(loss(red, green)) == pytest.approx(2)
    assert float(loss(red, 0.3 * red)) == pytest.approx(0, abs=1e-6)
    half = red.clone()
    half[:, :, :, 2:] = green[:, :, :, 2:]  # at half of the places, and not at the first
    assert float(loss(half, red)) == pytest.approx((1 + 1 + 0) / 3, rel=1e-5)


def test_grey_pictures_are_repeated(script: Callable[[nn.Module], Path]) -> None:
    loss, grey, other = (
        PerceptualLoss(script(Convolutions())),
        pictures(2, 1, 6, 7),
        pictures(2, 1, 6, 7, seed=1),
    )
    expected = loss(grey.repeat(1, 3, 1, 1), other.repeat(1, 3, 1, 1))
    assert torch.equal(loss(grey, other), expected) and float(expected) > 0


def test_only_pictures_have_gradients(script: Callable[[nn.Module], Path]) -> None:
    loss = PerceptualLoss(script(Convolutions()))
    decoded, truth = pictures(1, 3, 8, 8).requires_grad_(), pictures(1, 3, 8, 8, seed=1)
    (gradient,) = torch.autograd.grad(loss(decoded, truth), decoded)
    direction, size = pictures(1, 3, 8, 8, seed=2), 1e-2
    values = [float(loss(decoded.detach() + sign * size * direction, truth)) for sign in (1, -1)]
    slope = (values[0] - values[1]) / (2 * size)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(decoded, truth), loss(decoded.detach(), truth))
        found = loss(decoded, truth)
    assert torch.equal(found, loss(decoded, truth)), "float32 under autocast"


@pytest.mark.parametrize("names", ["torchvision", "lpips"])
def test_vgg16_and_lpips_are_those_published(names: str, tmp_path: Path) -> None:
    tensors = vgg_tensors() if names == "torchvision" else lpips_tensors()
    save_file(tensors, tmp_path / "vgg.safetensors")
    loss = PerceptualLoss(tmp_path / "vgg.safetensors")
    one, other = pictures(1, 3, 32, 32), pictures(1, 3, 32, 32, seed=1)
    layers = []
    for level, (a, b) in enumerate(zip(vgg_features(one), vgg_features(other), strict=True)):
        squares = (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square()
        if names == "lpips":
            squares = squares * tensors[f"lin{level}.model.1.weight"]
        layers.append(float(squares.sum(1).mean()))
    expected = sum(layers) if names == "lpips" else sum(layers) / len(layers)
    assert float(loss(one, other)) == pytest.approx(expected, rel=1e-3)
    assert float(loss(one[:, :, :5, :1], other[:, :, :5, :1])) > 0, "too small for the last layers"


def test_pictures_are_resized_for_the_network(script: Callable[[nn.Module], Path]) -> None:
    file = script(Fixed())
    loss = PerceptualLoss(file, (24, 24))
    assert float(loss(pictures(2, 3, 9, 30), pictures(2, 3, 9, 30, seed=1))) > 0
    with pytest.raises(InputError, match=r"Fixed\.pt': .*64x64: .*loss\.perceptual_size"):
        PerceptualLoss(file)


def written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def tensors_in(file: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, file)
    return file


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.pt", "no such file"),
        (lambda folder: folder, "no such file"),
        (lambda folder: written(folder / "a.pt", b"text"), "TorchScript"),
        (lambda folder: written(folder / "a.safetensors", b"text"), "safetensors"),
        (
            lambda folder: tensors_in(folder / "a.safetensors", {"blocks.0.w": torch.zeros(2)}),
            r"VGG16.*features\.0\.weight must be \[64, 3, 3, 3\].*none",
        ),
        (
            lambda folder: tensors_in(
                folder / "a.safetensors", vgg_tensors() | {"features.28.bias": torch.zeros(7)}
            ),
            r"features\.28\.bias must be \[512\].*\[7\]",
        ),
        (
            lambda folder: tensors_in(
                folder / "a.safetensors",
                vgg_tensors() | {"lin0.model.1.weight": torch.zeros(1, 64, 1, 1)},
            ),
            "lin0",
        ),
    ],
)
def test_files_that_hold_none_are_refused(
    make: Callable[[Path], Path], words: str, tmp_path: Path
) -> None:
    file = make(tmp_path)
    with pytest.raises(InputError, match=words) as raised:
        PerceptualLoss(file)
    said = str(raised.value)
    assert said.startswith(f"loss.perceptual_file = '{file}': ") and "\n" not in said


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (Named(), r"makes a dict of pictures \[2, 3, 64, 64\].*\[B, C, h, w\]"),
        (Joined(), r"makes a tensor \[1, 3, 64, 64\]"),
        (Rounded(), "no gradient"),
        (Overflowing(), "not finite"),
    ],
)
def test_networks_without_features_are_refused(
    network: nn.Module, words: str, script: Callable[[nn.Module], Path]
) -> None:
    with pytest.raises(InputError, match=words) as raised:
        PerceptualLoss(script(network))
    assert "\n" not in str(raised.value)


def test_a_size_that_only_training_meets_is_named(script: Callable[[nn.Module], Path]) -> None:
    class Unpadded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.avg_pool2d(x, 16)

    loss = PerceptualLoss(script(Unpadded()))
    with pytest.raises(InputError, match=r"8x8.*perceptual_size"):
        loss(pictures(1, 3, 8, 8), pictures(1, 3, 8, 8))


def test_it_begins_at_its_step_and_is_no_part_of_the_loss_module(
    script: Callable[[nn.Module], Path],
) -> None:
    config = LossConfig(
        perceptual=0.5, perceptual_file=script(Convolutions()), perceptual_start=2, magnify=0.0
    )
    model = RIAE(RiaeConfig(latent_channels=3, downsample=2.0, width=16), 1)
    loss, image = WindowLoss(model, config, seed=0), pictures(2, 1, 8, 8)
    assert {name.split(".")[0] for name in loss.state_dict()} == {"model"}
    total, figures = loss(image, torch.arange(2), step=1)
    assert "perceptual" not in figures and float(total.detach()) == float(figures["pixel"])
    total, figures = loss(image, torch.arange(2), step=2)
    expected = float(figures["pixel"]) + 0.5 * float(figures["perceptual"])
    assert float(total.detach()) == pytest.approx(expected) and float(figures["perceptual"]) > 0


def test_it_draws_no_random_numbers_of_the_model(tmp_path: Path) -> None:
    save_file(vgg_tensors(), tmp_path / "vgg.safetensors")
    model = RIAE(RiaeConfig(latent_channels=3, downsample=2.0, width=16), 1)
    begun = []
    for more in ({}, {"perceptual": 0.1, "perceptual_file": tmp_path / "vgg.safetensors"}):
        torch.manual_seed(0)
        loss = WindowLoss(model, LossConfig(discriminator=0.1, **more), seed=0)
        begun.append({name: value.clone() for name, value in loss.state_dict().items()})
    torch.testing.assert_close(begun[1], begun[0], rtol=0, atol=0)


CONFIG = """
stage = "riae"
[riae]
latent_channels = 3
downsample = 2.0
width = 16
[train]
steps = 2
batch = 8
[tracking]
enabled = false
"""


def run_config(folder: Path, digits: Path, *more: Any) -> RiaeRun:
    (folder / "riae.toml").write_text(CONFIG)
    settings = [f"run={folder}/run", f"data.shards={digits}", *more]
    config = load_config(folder / "riae.toml", settings)
    assert isinstance(config, RiaeRun)
    return config


def test_a_run_goes_on_with_the_same_file_alone(
    digits: Path, tmp_path: Path, script: Callable[[nn.Module], Path]
) -> None:
    torch.manual_seed(0)
    file, moved = script(Convolutions()), tmp_path / "moved.pt"

    def config(file: Path, steps: int) -> RiaeRun:
        more = "loss.perceptual=0.1", f"loss.perceptual_file={file}", f"train.steps={steps}"
        return run_config(tmp_path, digits, *more)

    assert train(config(file, 2))["perceptual"] > 0
    shutil.copy(file, moved)
    assert train(config(moved, 3))["step"] == 3
    torch.manual_seed(1)
    other = script(Convolutions()).rename(tmp_path / "other.pt")
    for steps in (3, 4):  # finished, and not
        with pytest.raises(InputError, match="perceptual_hash"):
            train(config(other, steps))
    with pytest.raises(InputError, match="no such file"):
        train(config(tmp_path / "gone.pt", 3))


def test_a_weight_needs_a_file(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"perceptual = 0\.1: .*perceptual_file"):
        run_config(tmp_path, digits, "loss.perceptual=0.1")


def test_a_plan_counts_the_network(
    digits: Path, tmp_path: Path, script: Callable[[nn.Module], Path]
) -> None:
    network, dimensions = Convolutions(), Dimensions((16, 12), 1)
    plain = Workload(run_config(tmp_path, digits), dimensions)
    more = "loss.perceptual=0.1", f"loss.perceptual_file={script(network)}"
    work = Workload(run_config(tmp_path, digits, *more), dimensions)
    # Multiplications and additions of a pixel: of all places, and of a quarter of them.
    pixel = 2 * (3 * 6 * 9 + 6 * 8 * 9 // 4)
    found = image_cost(work).flops - image_cost(plain).flops
    assert found == pytest.approx(3 * pixel * 16 * 12)  # of both pictures, and back through one
    weights = sum(4 * weight.numel() for weight in network.parameters())
    needed, without = memory(work, 1), memory(plain, 1)
    assert needed["total"] - without["total"] == needed["perceptual"]
    kept = (needed["perceptual"] - weights) / (8 * 16 * 12 * 4)  # numbers per pixel
    assert 6 + 2 < kept < 10 * (3 + 6 + 2)
