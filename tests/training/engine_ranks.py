"""What the engine tests train, alone or as ranks of a job (``children.Ranks``): functions of this
process's World.

Run as a program, engine_ranks.py FOLDER trains with DeepSpeed in a process that no launcher
started, and writes FOLDER/alone.json.
"""

from __future__ import annotations

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from r2id import dist
from r2id.checkpoints import Checkpoint, reading, writing
from r2id.checkpoints.files import Meta
from r2id.checkpoints.state import EngineState, Source
from r2id.config import (
    DiffusionConfig,
    EngineConfig,
    LevelConfig,
    LossConfig,
    OptimConfig,
    R2idConfig,
    RiaeConfig,
    TrainConfig,
)
from r2id.dist import World
from r2id.errors import InputError, NonFiniteError
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.training.engines import Engine, make_engine
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import riae_loss

STEPS, HALF, BATCH, MICRO = 4, 2, 8, 2
ALONE = World(0, 1, 0, torch.device("cpu"))
# Odd sizes: elements that do not divide by the ranks. A clip that binds.
RIAE_CONFIGS = {
    "riae": RiaeConfig(latent_channels=3, downsample=2.0, width=15, features=3, ffn_ratio=1.0),
    "attention": RiaeConfig(
        kind="attention",
        latent_channels=3,
        downsample=2.0,
        width=15,
        pixel_width=15,
        heads=1,
        encoder_blocks=1,
        decoder_blocks=1,
        fourier=(-1, 2),
        ffn_ratio=1.0,
    ),
}
LOSSES = {
    "riae": LossConfig(magnify=0.5),
    "attention": LossConfig(encode_cloud=0.5, decode_pixels=7),
}
R2ID_CONFIG = R2idConfig(
    width=16,
    heads=2,
    encoder_blocks=1,
    decoder_blocks=1,
    dropout=0.0,
    fourier=(-1, 2),
    levels=(LevelConfig(width=8, blocks=1),),
)
OPTIM = OptimConfig(clip=0.3, weight_decay=0.1)


def make(
    kind: str,
    zero_stage: int,
    world: World,
    stage: str = "riae",
    precision: str = "float32",
    **zero: Any,
) -> Engine:
    torch.manual_seed(0)
    module: nn.Module
    if stage in RIAE_CONFIGS:
        module = riae_loss(RIAE(RIAE_CONFIGS[stage], 1), LOSSES[stage], seed=0)
    else:
        module = R2idLoss(R2ID(R2ID_CONFIG, 3, 2), DiffusionConfig(), 4.0, seed=0)
    for block in module.model.blocks():
        block.forward = partial(recompute, block.forward, use_reentrant=False)
    train = TrainConfig(steps=STEPS, batch=BATCH, micro_batch=MICRO, precision=precision)
    return make_engine(
        module,
        optim=OPTIM,
        train=train,
        world=world,
        engine=EngineConfig(
            kind=kind, zero_stage=zero_stage, deepspeed={"zero_optimization": zero} if zero else {}
        ),
    )


def run(
    engine: Engine,
    first: int,
    last: int,
    world: World,
    stage: str = "riae",
    losses: list[float] | None = None,
) -> list[float]:
    """Gradient norms of steps first … last − 1. Step i's samples depend on i alone, and are dealt
    out to the ranks.

    ``losses`` takes each step's, averaged over the whole batch.
    """
    norms = []
    for step in range(first, last):
        drawn = torch.randn(
            BATCH, 3 if stage == "r2id" else 1, 5, 4, generator=torch.Generator().manual_seed(step)
        )
        index = torch.arange(BATCH) + step * BATCH
        micro_batches = torch.arange(BATCH)[world.rank :: world.world_size].split(MICRO)
        total = torch.zeros(())
        for some in micro_batches:
            batch = {"index": index[some], "step": step}
            batch |= (
                {"latent": drawn[some], "condition": index[some] % 2}
                if stage == "r2id"
                else {"image": drawn[some]}
            )
            loss, figures = engine.forward(batch)
            assert not any(figure.requires_grad for figure in figures.values())
            engine.backward(loss, len(micro_batches))
            total += loss.detach() * len(some) / BATCH
        if losses is not None:
            losses.append(float(dist.all_reduce_sum(total)))
        norms.append(float(engine.step(1e-3 * (step + 1), step)))
        engine.ema.update(step)
    return norms


def save(folder: Path, state: EngineState) -> None:
    """To FOLDER/checkpoints."""
    meta = Meta(
        stage="riae", step=state.step, samples=state.step * BATCH, seed=0, config={}, model={}
    )
    writing.save(folder, state, meta, keep=9)


def train_stage(world: World, zero_stage: int, folder: Path) -> dict[str, list[float]]:
    """Train through; and again from the half-way checkpoint, at this stage and at the next."""
    engine = make("deepspeed", zero_stage, world)
    norms = run(engine, 0, HALF, world)
    save(folder, engine.state())
    norms += run(engine, HALF, STEPS, world)
    save(folder, engine.state())
    resumed = {}
    for other in (zero_stage, (zero_stage + 1) % 4):
        again = make("deepspeed", other, world)
        reading.resume(folder / "checkpoints" / f"step-{HALF:08d}", again.check, again.load)
        resumed[other] = run(again, HALF, STEPS, world)
        save(folder / f"resumed-at-{other}", again.state())
    return {"norms": norms, "same": resumed[zero_stage], "other": resumed[(zero_stage + 1) % 4]}


def train_rounded(world: World, zero_stage: int, folder: Path) -> dict[str, Any]:
    """Train bfloat16 weights with float32 masters: save before the first step and half-way, and go
    on from there.
    """
    engine = make("deepspeed", zero_stage, world, precision="bfloat16_weights")
    save(folder, engine.state())
    norms = run(engine, 0, HALF, world)
    save(folder, engine.state())
    kinds = sorted(
        {str(p.dtype) for p in engine.model.parameters()}
        | {str(master.dtype) for master in engine.masters}
    )
    norms += run(engine, HALF, STEPS, world)
    again = make("deepspeed", zero_stage, world, precision="bfloat16_weights")
    reading.resume(folder, again.check, again.load)
    return {"norms": norms, "resumed": run(again, HALF, STEPS, world), "kinds": kinds}


def train_through(
    world: World, zero_stage: int, stage: str = "riae", precision: str = "float32"
) -> list[float]:
    return run(make("deepspeed", zero_stage, world, stage, precision), 0, STEPS, world, stage)


def go_on(world: World, zero_stage: int, zero: dict[str, Any], folder: Path) -> list[float]:
    """Train from the half-way checkpoint of one process without DeepSpeed."""
    engine = make("deepspeed", zero_stage, world, **zero)
    reading.resume(folder, engine.check, engine.load)
    return run(engine, HALF, STEPS, world)


def step_once(world: World, zero_stage: int | None, folder: Path) -> float:
    """Train one step from the newest checkpoint, if there is any, to the next one; the loss."""
    kind = "local" if zero_stage is None else "deepspeed"
    engine, losses = make(kind, zero_stage or 0, world), []
    if Checkpoint.open_newest(folder):
        reading.resume(folder, engine.check, engine.load)
    run(engine, engine.steps, engine.steps + 1, world, losses=losses)
    save(folder, engine.state())
    return losses[0]


def resume(_world: World, folder: Path) -> tuple[str, int]:
    """What is said of going on from a checkpoint, and how often it was loaded."""
    loaded: list[Source] = []
    try:
        reading.resume(folder, lambda _: None, loaded.append)
    except InputError as error:
        return str(error), len(loaded)
    return "", len(loaded)


def spoil(world: World, zero_stage: int) -> tuple[str, bool]:
    """Train a step where the last rank sees a picture that is not finite; what is said, and
    whether no weight changed.
    """
    engine = make("deepspeed", zero_stage, world)
    run(engine, 0, 1, world)
    before = _copied(engine)
    spoilt = world.rank == world.world_size - 1
    image = torch.full((MICRO, 1, 5, 4), math.nan if spoilt else 0.5)
    said = "not stopped"
    try:
        for _ in range(2):
            engine.backward(
                engine.forward({"image": image, "index": torch.arange(MICRO), "step": 1})[0], 2
            )
        engine.step(1e-3, 1)
    except NonFiniteError as error:
        said = str(error)
    after = _copied(engine)
    return said, all(
        torch.equal(before[kind][name], after[kind][name])
        for kind in ("model", "ema")
        for name in before[kind]
    )


def _copied(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {name: part.values.clone() for name, part in parts.items()}
        for kind, parts in engine.state().parts.items()
    }


def collectives(world: World) -> dict[str, Any]:
    dist.barrier()
    number = torch.tensor(float(world.rank))
    return {
        "sum": float(dist.all_reduce_sum(number)),
        "kept": float(number),
        "broadcast": dist.broadcast_object({"rank": world.rank}),
        "main": dist.is_main(),
        "ranks": dist.world_size(),
    }


def refused(world: World) -> str:
    """What is said of an engine for one process alone."""
    with pytest.raises(InputError) as error:
        make("local", 0, world)
    return str(error.value)


def refused_by_deepspeed(world: World, zero: dict[str, Any]) -> str:
    """What is said of settings that DeepSpeed does not take."""
    with pytest.raises(InputError) as error:
        make("deepspeed", 1, world, **zero)
    return str(error.value)


def main(folder: Path) -> None:
    """Train with DeepSpeed in a process that no launcher started."""
    world = dist.init()
    norms = {stage: train_through(world, stage) for stage in range(4)}
    (folder / "alone.json").write_text(json.dumps(norms))
    dist.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
