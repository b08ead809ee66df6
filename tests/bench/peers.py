"""The codes that autoencoders.py compares, and the one loop that trains all of them.

A code maps images [B, C, H, W] in [−1, 1] to latents [B, L, h, w] and back. All have the same cells
and channels. CODES lists them; to add one, write a class with the methods of Code and add a line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeRun
from r2id.config.losses import PixelLoss
from r2id.errors import InputError
from r2id.images import psnr, resize
from r2id.models.coords import Size
from r2id.models.lattice import grid_of
from r2id.models.riae import RIAE
from r2id.training.engines.local import LocalEngine
from r2id.training.losses.pixel import reconstruction_loss
from r2id.training.losses.riae import riae_loss
from r2id.training.pca import fit_pca, start_from_pca

WARM_UP = 0.05
"""Share of the seconds in which the learning rate rises to its peak."""
TUNING = 0.2
"""Share of the seconds for which each of several learning rates is tried."""
Batches = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, images per batch) → images [B, C, H, W] in [−1, 1] and the numbers [B] of their draws."""


class Code:
    """A trained code. Images that it returns are clipped to [−1, 1]."""

    parameters = 0

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] → [B, L, h, w]."""
        raise NotImplementedError

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        """Decode latents at the size of the images that were encoded."""
        raise NotImplementedError

    def decode_at(self, latents: Tensor, size: Size, own: Size) -> Tensor:
        """Decode latents of images of size ``own`` at another size: here by bicubic resizing."""
        return resize(self.decode(latents, own), size).clamp(-1, 1)

    def run_at(self, latents: Tensor, size: Size, own: Size) -> Tensor | None:
        """Run the decoder's network on resized latents, if it can make that size so."""
        return None


class Linear(Code):
    """PCA of the pixels of each cell; other sizes by bicubic resizing."""

    def __init__(self, weights: dict[str, Tensor], cell: int) -> None:
        self.weights, self.cell = weights, cell
        self.parameters = sum(part.numel() for part in weights.values())

    def encode(self, images: Tensor) -> Tensor:
        grid = grid_of((images.shape[2], images.shape[3]), self.cell)
        cells = rearrange(
            _filled(images, grid, self.cell),
            "b c (h i) (w j) -> b h w (c i j)",
            i=self.cell,
            j=self.cell,
        )
        code = F.linear(cells, self.weights["to_code.weight"], self.weights["to_code.bias"])
        return code.movedim(-1, 1)

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        code = latents.movedim(1, -1)
        cells = F.linear(code, self.weights["from_code.weight"], self.weights["from_code.bias"])
        images = rearrange(cells, "b h w (c i j) -> b c (h i) (w j)", i=self.cell, j=self.cell)
        return images[:, :, : own[0], : own[1]].clamp(-1, 1)


class Riae(Code):
    """An RIAE of either kind."""

    def __init__(self, model: RIAE, bfloat16: bool) -> None:
        self.model, self.bfloat16 = model.eval(), bfloat16
        self.parameters = count(model)

    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.model.encode(images)

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        return self.decode_at(latents, own, own)

    def decode_at(self, latents: Tensor, size: Size, own: Size) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.model.decode(latents, size, native=own).float().clamp(-1, 1)


class Convolutional(Code):
    """A convolutional autoencoder; images that are no multiple of the cell are filled up to one."""

    def __init__(self, model: ConvolutionalModel, cell: int) -> None:
        self.model, self.cell = model.eval(), cell
        self.parameters = count(model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        grid = grid_of((images.shape[2], images.shape[3]), self.cell)
        return self.model.to_latents(_filled(images, grid, self.cell))

    @torch.no_grad()
    def decode(self, latents: Tensor, own: Size) -> Tensor:
        return self.model.to_images(latents)[:, :, : own[0], : own[1]].clamp(-1, 1)

    def run_at(self, latents: Tensor, size: Size, own: Size) -> Tensor | None:
        if any(side % self.cell for side in (*size, *own)):
            return None
        return self.decode(resize(latents, grid_of(size, self.cell)), size)


class ConvolutionalModel(nn.Module):
    """What the two convolutional autoencoders have in common."""

    step: ClassVar[int]
    """Of which numbers a width may be a multiple."""

    def to_latents(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def to_images(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class KlModel(ConvolutionalModel):
    """AutoencoderKL of diffusers, as it is, with one block per level; its mode is the code."""

    step = 8  # groups of its norms

    def __init__(self, width: int, channels: int, latents: int, cell: int) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise InputError(f"kl: needs diffusers (pip install 'r2id[bench]'): {error}") from None
        levels = 1 + int(math.log2(cell))
        self.inner = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(width * min(4, 2**level) for level in range(levels)),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=latents,
        )

    def to_latents(self, images: Tensor) -> Tensor:
        return self.inner.encode(_by_pixels(images)).latent_dist.mode()

    def to_images(self, latents: Tensor) -> Tensor:
        return self.inner.decode(_by_pixels(latents)).sample


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PlainModel(ConvolutionalModel):
    """Strided convolutions and residual blocks, and the same back by pixel shuffle.

    All blocks are on small grids, so that a step is fast on a CPU.
    """

    step = 2

    def __init__(self, width: int, channels: int, latents: int, cell: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(1 + int(math.log2(cell)))]
        down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        up: list[nn.Module] = []
        for fine, coarse in pairwise(widths):
            down += [nn.GELU(), nn.Conv2d(fine, coarse, 4, 2, 1), _Residual(coarse)]
            up = [
                _Residual(coarse),
                nn.Conv2d(coarse, 4 * fine, 3, padding=1),
                nn.PixelShuffle(2),
                nn.GELU(),
                *up,
            ]
        self.down = nn.Sequential(*down, nn.Conv2d(widths[-1], latents, 1))
        self.up = nn.Sequential(
            nn.Conv2d(latents, widths[-1], 1), *up, nn.Conv2d(width, channels, 3, padding=1)
        )

    def to_latents(self, images: Tensor) -> Tensor:
        return self.down(_by_pixels(images))

    def to_images(self, latents: Tensor) -> Tensor:
        return self.up(_by_pixels(latents))


class PictureLoss(nn.Module):
    """Pixel loss of images through a convolutional autoencoder, called as r2id's losses are."""

    def __init__(self, model: ConvolutionalModel, kind: PixelLoss) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        decoded = self.model.to_images(self.model.to_latents(image))
        return reconstruction_loss(decoded.float(), image, self.kind), {}


@dataclass(frozen=True)
class Job:
    """What every code is made for: the same images, cells and seconds."""

    riae: RiaeRun
    first: RiaeRun
    size: Size
    seconds: float
    batches: Batches
    pca: Callable[[], Iterator[Tensor]]
    """Training images for the PCA, in batches."""

    @property
    def channels(self) -> int:
        return self.riae.data.channels

    def weights(self) -> dict[str, Tensor]:
        """Fit the PCA, from which RIAE starts and which is the floor of the comparison."""
        riae, images = self.riae.riae, list(self.pca())
        grid = riae.grid_for(self.size)
        cells = sum(map(len, images)) * math.prod(grid)
        return fit_pca(images, riae.cell, riae.latent_channels, cells)


@dataclass(frozen=True)
class Training:
    """How one code is trained."""

    module: nn.Module
    config: RiaeRun
    before: float = 0.0
    """CPU seconds that its start has taken."""


Made = tuple[Training | None, Callable[[], Code]]
"""A module to train, if any, and what makes the code once its weights are set."""


def pca(job: Job) -> Made:
    return None, lambda: Linear(job.weights(), job.riae.riae.cell)


def riae(job: Job) -> Made:
    began = time.process_time()
    torch.manual_seed(job.riae.seed)
    model = RIAE(job.riae.riae, job.channels)
    start_from_pca(model, job.weights())
    module = riae_loss(model, job.riae.loss, job.riae.seed)
    training = Training(module, job.riae, time.process_time() - began)
    return training, lambda: Riae(model, job.riae.train.autocast)


def first(job: Job) -> Made:
    torch.manual_seed(job.first.seed)
    model = RIAE(job.first.riae, job.channels)
    module = riae_loss(model, job.first.loss, job.first.seed)
    return Training(module, job.first), lambda: Riae(model, job.first.train.autocast)


def _convolutional(kind: type[KlModel] | type[PlainModel], job: Job) -> Made:
    config = job.riae
    cell, latents = config.riae.cell, config.riae.latent_channels

    def build(width: int) -> ConvolutionalModel:
        return kind(width, job.channels, latents, cell)

    wanted, best = count(RIAE(config.riae, job.channels)), 8
    for width in range(8, 1024, kind.step):
        with torch.device("meta"):
            counts = [count(build(side)) for side in (best, width)]
        errors = [abs(math.log(found / wanted)) for found in counts]
        if errors[1] > errors[0]:
            break
        best = width
    torch.manual_seed(config.seed)
    model = build(best)
    module = PictureLoss(model, config.loss.pixel)
    # On a CPU that has it, bfloat16 trains them 1.6 times as fast as float32.
    halved = config.train.model_copy(update={"precision": "bfloat16"})
    training = Training(module, config.model_copy(update={"train": halved}))
    return training, lambda: Convolutional(model, cell)


def kl(job: Job) -> Made:
    return _convolutional(KlModel, job)


def plain(job: Job) -> Made:
    return _convolutional(PlainModel, job)


CODES: dict[str, Callable[[Job], Made]] = {
    "pca": pca,
    "riae": riae,
    "first": first,
    "kl": kl,
    "plain": plain,
}
RATES = {"kl": (5e-4, 1.5e-3, 4e-3), "plain": (5e-4, 1.5e-3, 4e-3)}
"""Learning rates that are tried; the others have those of their configs."""


def train(
    job: Job, name: str, quality: Callable[[Code], float]
) -> tuple[Code, dict[str, Tensor], dict[str, Any]]:
    """Train one of CODES for the job's CPU seconds → the code, its weights and figures.

    The seconds are those of the process while it computes: neither loading nor evaluation counts.
    ``quality`` measures RIAE before its first step.
    """
    training, make = CODES[name](job)
    if training is None:
        began = time.process_time()
        code = make()
        return code, {}, {"cpu_seconds": time.process_time() - began, "steps": 0}
    rates, tried = RATES.get(name, (training.config.optim.lr,)), dict[str, float]()
    if len(rates) > 1:
        for rate in rates:
            attempt, make_one = CODES[name](job)
            assert attempt is not None
            run(job, attempt, rate, TUNING * job.seconds)
            tried[f"{rate:g}"] = _quality(job, make_one())
    rate = max(rates, key=lambda rate: tried.get(f"{rate:g}", 0.0))
    figures: dict[str, Any] = {"rate": rate, "tried": tried}
    if name == "riae":
        figures["step_0"] = quality(make())
    figures |= run(job, training, rate, job.seconds)
    model = training.module.model
    weights = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    return make(), weights, figures


def load(job: Job, name: str, weights: dict[str, Tensor]) -> Code:
    """Make a code of weights that ``train`` returned."""
    training, make = CODES[name](job)
    if training is not None:
        training.module.model.load_state_dict(weights)
    return make()


def run(job: Job, training: Training, rate: float, seconds: float) -> dict[str, float]:
    """Train with a peak learning rate for that many CPU seconds; leaves the averaged weights."""
    config = training.config
    engine = LocalEngine(training.module, config.optim, config.train, torch.device("cpu"))
    used, wall, step = training.before, 0.0, 0
    while used < seconds:
        images, index = job.batches(step, config.train.batch)
        began, began_wall = time.process_time(), time.perf_counter()
        loss, _ = engine.forward({"image": images, "index": index, "step": step})
        engine.backward(loss, 1)
        engine.step(rate * _schedule(used / seconds, config.optim.lr_end / config.optim.lr), step)
        engine.ema.update(step)
        used += time.process_time() - began
        wall += time.perf_counter() - began_wall
        step += 1
    averages = engine.ema_state()
    assert averages is not None
    training.module.model.load_state_dict(averages)
    training.module.eval()
    return {
        "steps": step,
        "batch": config.train.batch,
        "images_per_second": step * config.train.batch / (used - training.before),
        "cpu_seconds": used,
        "wall_seconds": wall,
    }


def count(model: nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())


def _schedule(share: float, end: float) -> float:
    """Return the learning rate relative to its peak, at a share of the seconds."""
    if share < WARM_UP:
        return max(0.02, share / WARM_UP)
    progress = min(1.0, (share - WARM_UP) / (1 - WARM_UP))
    return end + 0.5 * (1 - end) * (1 + math.cos(math.pi * progress))


def _quality(job: Job, code: Code) -> float:
    """Mean PSNR on some training images, by which learning rates are chosen."""
    images, _ = job.batches(1 << 30, 256)
    own = (images.shape[2], images.shape[3])
    error = (code.decode(code.encode(images), own) - images).square().flatten(1).mean(1)
    return float(psnr(error).mean())


def _filled(images: Tensor, grid: Size, cell: int) -> Tensor:
    """Repeat the last row and column up to the end of the last cells."""
    beyond = [cells * cell - side for cells, side in zip(grid, images.shape[2:], strict=True)]
    return F.pad(images, (0, beyond[1], 0, beyond[0]), mode="replicate")


def _by_pixels(images: Tensor) -> Tensor:
    """Lay images out pixel by pixel, for which convolutions are faster."""
    return images.contiguous(memory_format=torch.channels_last)
