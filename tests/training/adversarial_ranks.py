"""What the tests of a discriminator train, alone or as ranks of a job (``children.Ranks``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints import reading, writing
from r2id.checkpoints.files import Meta
from r2id.config import EngineConfig, LossConfig, OptimConfig, RiaeConfig, TrainConfig
from r2id.dist import World
from r2id.models.riae import RIAE
from r2id.training.engines import Engine, make_engine
from r2id.training.losses.windows import WindowLoss

STEPS, START, BATCH, MICRO = 5, 2, 8, 2
ALONE = World(0, 1, 0, torch.device("cpu"))
# Odd sizes: elements that do not divide by the ranks.
RIAE_CONFIG = RiaeConfig(latent_channels=3, downsample=2.0, width=15, features=3, ffn_ratio=1.0)
LOSS = LossConfig(
    discriminator=0.5, discriminator_start=START, discriminator_width=3, ssim=0.1, magnify=0.5
)


def make(world: World, zero_stage: int | None, precision: str = "float32", **loss: Any) -> Engine:
    """An engine at a ZeRO stage, or plain PyTorch."""
    torch.manual_seed(0)
    return make_engine(
        WindowLoss(RIAE(RIAE_CONFIG, 1), LOSS.model_copy(update=loss), seed=0),
        optim=OptimConfig(clip=0.3, weight_decay=0.1),
        train=TrainConfig(steps=STEPS, batch=BATCH, micro_batch=MICRO, precision=precision),
        engine=EngineConfig(
            kind="local" if zero_stage is None else "deepspeed", zero_stage=zero_stage or 0
        ),
        world=world,
    )


def run(engine: Engine, first: int, last: int, world: World) -> list[float]:
    """Gradient norms of steps first … last − 1, whose samples depend on the step alone."""
    norms = []
    for step in range(first, last):
        images = torch.randn(BATCH, 1, 6, 4, generator=torch.Generator().manual_seed(step))
        micro_batches = torch.arange(BATCH)[world.rank :: world.world_size].split(MICRO)
        for some in micro_batches:
            batch = {"image": images[some], "index": some + step * BATCH, "step": step}
            loss, _ = engine.forward(batch)
            engine.backward(loss, len(micro_batches))
        norms.append(float(engine.step(1e-3 * (step + 1), step)))
        engine.ema.update(step)
    return norms


def save(folder: Path, engine: Engine) -> None:
    """To FOLDER/checkpoints."""
    step = engine.steps
    meta = Meta(stage="riae", step=step, samples=step * BATCH, seed=0, config={}, model={})
    writing.save(folder, engine.state(), meta, keep=9)


def run_once(world: World, zero_stage: int | None, precision: str) -> list[float]:
    return run(make(world, zero_stage, precision), 0, STEPS, world)


def train(world: World, zero_stage: int | None, folder: Path) -> dict[int, list[float]]:
    """Train through; and again from checkpoints before the discriminator begins and after.

    Returns the norms of each, by the step that it begins at.
    """
    engine, norms = make(world, zero_stage), []
    for step in range(STEPS):
        save(folder, engine)
        norms += run(engine, step, step + 1, world)
    save(folder, engine)
    found = {0: norms}
    for first in (START - 1, START + 1):
        again = make(world, zero_stage)
        reading.resume(folder / "checkpoints" / f"step-{first:08d}", again.check, again.load)
        found[first] = run(again, first, STEPS, world)
        save(folder / f"from-{first}", again)
    return found


def train_decoder(world: World, zero_stage: int | None, folder: Path) -> None:
    """Train with a frozen encoder; save before the first step and after the last."""
    weight = 0.0 if zero_stage == 3 else LOSS.discriminator  # they do not go together
    engine = make(world, zero_stage, freeze_encoder=True, discriminator=weight)
    save(folder, engine)
    run(engine, 0, STEPS, world)
    save(folder, engine)
