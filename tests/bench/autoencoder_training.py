"""The loop that trains the codes that autoencoders.py compares, each for the same CPU seconds.

PEERS lists them; to add one, write a class with the methods of codes.Code, a function that makes
and trains it, and a line.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timed
import torch
from codes import Code, Convolutional, ConvolutionalModel, KlModel, Linear, PlainModel, Riae, count
from torch import Tensor, nn

from r2id.config import RiaeRun
from r2id.config.losses import PixelLoss
from r2id.images import psnr
from r2id.models.coords import Size
from r2id.models.riae import RIAE
from r2id.training.engines.local import LocalEngine
from r2id.training.losses.pixel import reconstruction_loss
from r2id.training.losses.riae import riae_loss
from r2id.training.pca import fit_pca, start_from_pca

TUNING = 0.2
"""Share of the seconds for which each of several learning rates is tried."""
Batches = Callable[[int, int], tuple[Tensor, Tensor]]
"""(step, images per batch) → images [B, C, H, W] in [−1, 1] and the numbers [B] of their draws."""


class PictureLoss(nn.Module):
    """Pixel loss of images through a convolutional autoencoder, called as r2id's losses are.

    ``noise`` is that of the latents in training, relative to the spread of each channel.
    """

    def __init__(self, model: ConvolutionalModel, kind: PixelLoss, noise: float) -> None:
        super().__init__()
        self.model, self.kind, self.noise = model, kind, noise

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        latents = self.model.to_latents(image)
        if self.noise:
            spread = latents.float().std((0, 2, 3), keepdim=True)
            latents = latents + self.noise * spread * torch.randn(latents.shape)
        decoded = self.model.to_images(latents)
        return reconstruction_loss(decoded.float(), image, self.kind), {}


@dataclass(frozen=True)
class Job:
    """What every code is made for: the same images, cells and seconds."""

    riae: RiaeRun
    size: Size
    seconds: float
    batches: Batches
    pca: Callable[[], Iterator[Tensor]]
    """Training images for the PCA, in batches."""

    @property
    def channels(self) -> int:
        return self.riae.data.channels

    def weights(self, lapped: bool) -> dict[str, Tensor]:
        """Fit the PCA of cells, or of cells that are lapped, from which RIAE starts."""
        riae, images = self.riae.riae, list(self.pca())
        grid = riae.grid_for(self.size)
        cells = sum(map(len, images)) * math.prod(grid)
        return fit_pca(images, riae.cell, riae.latent_channels, cells, lapped)


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
    return None, lambda: Linear(job.weights(lapped=False), job.riae.riae.cell, lapped=False)


def lapped(job: Job) -> Made:
    return None, lambda: Linear(job.weights(lapped=True), job.riae.riae.cell, lapped=True)


def riae(job: Job) -> Made:
    began = time.process_time()
    torch.manual_seed(job.riae.seed)
    model = RIAE(job.riae.riae, job.channels)
    start_from_pca(model, job.weights(job.riae.riae.lapped))
    module = riae_loss(model, job.riae.loss, job.riae.seed)
    training = Training(module, job.riae, time.process_time() - began)
    return training, lambda: Riae(model, job.riae.train.autocast)


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
    module = PictureLoss(model, config.loss.pixel, config.loss.latent_noise)
    # On a CPU that has it, bfloat16 trains them 1.6 times as fast as float32.
    halved = config.train.model_copy(update={"precision": "bfloat16"})
    training = Training(module, config.model_copy(update={"train": halved}))
    return training, lambda: Convolutional(model, cell)


def kl(job: Job) -> Made:
    return _convolutional(KlModel, job)


def plain(job: Job) -> Made:
    return _convolutional(PlainModel, job)


PEERS: dict[str, Callable[[Job], Made]] = {
    "pca": pca,
    "lapped": lapped,
    "riae": riae,
    "kl": kl,
    "plain": plain,
}
RATES = {"kl": (5e-4, 1.5e-3, 4e-3), "plain": (5e-4, 1.5e-3, 4e-3)}
"""Learning rates that are tried; the others have those of their configs."""


def train(
    job: Job, name: str, quality: Callable[[Code], float], file: Path | None = None
) -> tuple[Code, dict[str, Tensor], dict[str, Any]]:
    """Train one of PEERS for the job's CPU seconds → the code, its weights and figures.

    The seconds are those of the process while it computes: neither loading nor evaluation counts.
    ``quality`` measures RIAE before its first step. With a ``file`` an interrupted training goes on
    from it.
    """
    training, make = PEERS[name](job)
    if training is None:
        began = time.process_time()
        code = make()
        return code, {}, {"cpu_seconds": time.process_time() - began, "steps": 0}
    rates, tried = RATES.get(name, (training.config.optim.lr,)), dict[str, float]()
    if len(rates) > 1:
        for rate in rates:
            attempt, make_one = PEERS[name](job)
            assert attempt is not None
            run(job, attempt, rate, TUNING * job.seconds)
            tried[f"{rate:g}"] = _quality(job, make_one())
    rate = max(rates, key=lambda rate: tried.get(f"{rate:g}", 0.0))
    figures: dict[str, Any] = {"rate": rate, "tried": tried}
    if name == "riae":
        figures["step_0"] = quality(make())
    figures |= run(job, training, rate, job.seconds, file)
    model = training.module.model
    weights = {
        key: value.detach().clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    return make(), weights, figures


def load(job: Job, name: str, weights: dict[str, Tensor]) -> Code:
    """Make a code of weights that ``train`` returned."""
    training, make = PEERS[name](job)
    if training is not None:
        training.module.model.load_state_dict(weights)
    return make()


def run(
    job: Job, training: Training, rate: float, seconds: float, file: Path | None = None
) -> dict[str, float]:
    """Train with a peak learning rate for that many CPU seconds; see timed.run."""
    config = training.config
    batch = config.train.batch

    def load(step: int) -> dict[str, Tensor]:
        images, index = job.batches(step, batch)
        return {"image": images, "index": index}

    figures = timed.run(
        LocalEngine(training.module, config.optim, config.train, torch.device("cpu")),
        load,
        rate,
        seconds,
        end=config.optim.lr_end / config.optim.lr,
        before=training.before,
        seed=config.seed,
        file=file,
    )
    per_step = figures.pop("seconds_per_step")
    return figures | {"batch": batch, "images_per_second": batch / per_step}


def _quality(job: Job, code: Code) -> float:
    """Mean PSNR on some training images, by which learning rates are chosen."""
    images, _ = job.batches(1 << 30, 256)
    own = (images.shape[2], images.shape[3])
    error = (code.decode(code.encode(images), own) - images).square().flatten(1).mean(1)
    return float(psnr(error).mean())
