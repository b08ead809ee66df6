"""Kernels and host syncs of a training step and of a sampling step, counted without a GPU.

    python tests/bench/kernels.py [--only NAME] [--places N]

The real modules, engine and sampler run on tests/stand_in.py, at small widths and a batch of two:
numbers depend on neither. ``--places`` lists the places that launch and wait most. Figures are in
tests/bench/README.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from r2id.config import R2idRun, RiaeConfig, RiaeRun, load_config
from r2id.models.codec import Codec
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.sampling.sampler import Sampler
from r2id.training import step as training_step
from r2id.training.blocks import prepare_blocks
from r2id.training.engines.local import LocalEngine
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import riae_loss

sys.path.insert(0, str(Path(__file__).parents[2]))  # where tests/ is
from tests.stand_in import GPU, Counts, stand_in_gpu

CONFIGS = Path(__file__).parents[2] / "configs"
BATCH, LATENT_CHANNELS, CLASSES, STEPS = 2, 8, 10, 6
_NARROW_RIAE = ["riae.width=32", "riae.features=4", "riae.latent_channels=8"]


@dataclass(frozen=True)
class Case:
    """A configuration, and the size of its images or latent grids."""

    config: str
    size: tuple[int, int]
    overrides: tuple[str, ...] = ()


CASES = {
    "MNIST reference RIAE": Case("mnist/reference-riae.toml", (32, 32), (*_NARROW_RIAE,)),
    "MNIST RIAE by attention": Case("mnist/published-riae.toml", (32, 32)),
    "MNIST reference R2ID": Case("mnist/reference-r2id.toml", (8, 8), ("r2id.width=32",)),
    "ImageNet RIAE": Case("imagenet/riae-256.toml", (64, 64), (*_NARROW_RIAE,)),
    "R2ID-B, 256 tokens": Case("imagenet/r2id-b-256.toml", (16, 16), ("r2id.width=96",)),
    "R2ID-B, 1,024 tokens": Case("imagenet/r2id-b-512.toml", (32, 32), ("r2id.width=96",)),
}


@dataclass
class Figures:
    """Kernels and host syncs by place."""

    kernels: Counter[str]
    syncs: Counter[str]

    def __sub__(self, other: Figures) -> Figures:
        return Figures(self.kernels - other.kernels, self.syncs - other.syncs)

    @property
    def random(self) -> int:
        """Kernels of random numbers."""
        return sum(count for place, count in self.kernels.items() if place.startswith("rng.py"))

    def __str__(self) -> str:
        return (
            f"{self.kernels.total():,} kernels, {self.random} of them for random numbers, "
            f"{self.syncs.total()} syncs"
        )


def counted(counts: Counts, work: Callable[[], Any]) -> Figures:
    """Count what a call does."""
    counts.clear()
    work()
    return Figures(Counter(counts.kernels), Counter(counts.syncs))


def loss_module(config: RiaeRun | R2idRun, size: tuple[int, int]) -> tuple[Any, dict[str, Any]]:
    """Make the module that a stage trains, and a micro-batch as it is loaded, on the CPU."""
    index = torch.arange(BATCH)
    if isinstance(config, RiaeRun):
        module = riae_loss(RIAE(config.riae, config.data.channels), config.loss, 0)
        return module, {"image": torch.rand(BATCH, config.data.channels, *size), "index": index}
    model = R2ID(config.r2id, LATENT_CHANNELS, CLASSES)
    return R2idLoss(model, config.diffusion, (size[0] * size[1]) ** 0.5, 0), {
        "latent": torch.randn(BATCH, LATENT_CHANNELS, *size),
        "condition": index % CLASSES,
        "index": index,
    }


def count_training(counts: Counts, case: Case) -> dict[str, Figures]:
    """Count a micro-batch, that of the costliest of some steps, and an optimizer step.

    Each step is made once before it is counted, because later steps reuse what earlier ones made.
    """
    config = load_config(CONFIGS / case.config, [*case.overrides, "train.compile=false"])
    assert isinstance(config, RiaeRun | R2idRun)
    module, batch = loss_module(config, case.size)
    prepare_blocks(module.model.blocks(), config.train, torch.device("cpu"))
    engine = LocalEngine(module, config.optim, config.train, GPU)
    state: Any = SimpleNamespace(engine=engine, task=SimpleNamespace(inputs=lambda given: given))

    def micro_batch(step: int) -> None:
        loss, _ = training_step._forward(state, batch, step)
        engine.backward(loss, 1)

    def update(step: int) -> None:
        engine.step(1e-4, step)
        engine.ema.update(step)

    found = []
    for step in range(
        STEPS if isinstance(config, RiaeRun) else 1
    ):  # an RIAE's are of several kinds
        micro_batch(step)
        found.append(counted(counts, partial(micro_batch, step)))
        update(step)
    micro_batch(STEPS)
    return {
        "a micro-batch": max(found, key=lambda figures: figures.kernels.total()),
        "an optimizer step": counted(counts, partial(update, STEPS)),
    }


def make_sampler(config: R2idRun, grid: tuple[int, int], device: torch.device) -> Sampler:
    """Make a sampler of an untrained R2ID and an untrained RIAE."""
    model = R2ID(config.r2id, LATENT_CHANNELS, CLASSES).to(device).eval().requires_grad_(False)
    riae = RiaeConfig(latent_channels=LATENT_CHANNELS, width=32, features=4, downsample=4)
    codec = Codec(
        RIAE(riae, config.data.channels).to(device).eval().requires_grad_(False),
        torch.zeros(LATENT_CHANNELS).to(device),
        torch.ones(LATENT_CHANNELS).to(device),
        True,
        None,
        None,
        (4 * grid[0], 4 * grid[1]),
        config.data,
    )
    area = grid[0] * grid[1]
    facts = {"base_side": area**0.5, "areas": (area, area), "ratios": (1.0, 1.0)}
    return Sampler.of(model, codec, facts, config.diffusion, config.sample, True)


def count_sampling(counts: Counts, case: Case) -> dict[str, Figures]:
    """Count one guided step, with and without fresh noise, and a picture's beginning and end."""
    config = load_config(CONFIGS / case.config, case.overrides)
    assert isinstance(config, R2idRun)
    sampler = make_sampler(config, case.size, GPU)
    labels, seeds = torch.arange(BATCH), torch.arange(BATCH)

    def latents(steps: int, eta: float) -> Figures:
        given = {"steps": steps, "guidance": 2.0, "solver": "ddim", "eta": eta}
        return counted(counts, lambda: sampler.latents(labels, seeds, case.size, **given))

    few, many = latents(3, 0.0), latents(4, 0.0)  # the second of both may reuse what a first made
    step = many - latents(3, 0.0)
    few_noisy = latents(3, 1.0)
    return {
        "a sampling step": step,
        "a sampling step with η = 1": latents(4, 1.0) - few_noisy,
        "the noise, and reading the samples": few - step - step - step,
    }


def count(case: Case) -> dict[str, Figures]:
    """Count all that a case has."""
    torch.manual_seed(0)
    with stand_in_gpu() as counts:
        found = count_training(counts, case)
        return found | (count_sampling(counts, case) if "r2id" in case.config else {})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--places", type=int, default=0)
    options = parser.parse_args()
    for name in [options.only] if options.only else CASES:
        print(name)
        for what, figures in count(CASES[name]).items():
            print(f"  {what}: {figures}")
            for kind in (figures.kernels, figures.syncs)[: 2 * bool(options.places)]:
                for place, number in kind.most_common(options.places):
                    print(f"    {number:6} {place}")


if __name__ == "__main__":
    main()
