"""What the engine tests train, and what each process of their two-process job does.

Run by torchrun: engine_ranks.py FOLDER. The job trains at every ZeRO stage, saves, resumes at the same and at another
stage, stops and spoils the training loop on the shards in FOLDER/digits (see loop_ranks.py), and writes its figures to
FOLDER/result.json for test_engine_ranks.py to judge. With --alone, one process does
what it can by itself and writes FOLDER/alone.json; with --step, it goes on from FOLDER for a step.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from r2id import dist
from r2id.checkpoints import reading, writing
from r2id.checkpoints.files import Meta
from r2id.checkpoints.state import EngineState
from r2id.config import (
    DiffusionConfig,
    EngineConfig,
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
from r2id.training.losses.riae import RiaeLoss
from tests.training import loop_ranks

STEPS, HALF, BATCH, MICRO = 4, 2, 8, 2
ELASTIC = (1, 2, 3, 2, 1, None, 3, None, 0)
"""ZeRO stage of each step of a run that never goes on as it was; None is one process without DeepSpeed."""
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (3, {}),
    (3, {"sub_group_size": 200}),
    (3, {"offload_optimizer": {"device": "cpu"}}),
    (2, {"round_robin_gradients": True}),
    (1, {"offload_optimizer": {"device": "cpu"}}),
    (3, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
]
"""DeepSpeed's settings that lay the masters out in other ways."""
ALONE = World(0, 1, 0, torch.device("cpu"))
# Odd sizes: elements that do not divide by the ranks. A clip that binds.
RIAE_CONFIG = RiaeConfig(
    latent_channels=3,
    downsample=2.0,
    width=15,
    pixel_width=15,
    heads=1,
    encode_cloud=0.5,
    decode_pixels=7,
    fourier=(-1, 2),
    ffn_ratio=1.0,
)
R2ID_CONFIG = R2idConfig(
    width=16, heads=2, encoder_blocks=1, decoder_blocks=1, dropout=0.0, fourier=(-1, 2)
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
    if stage == "riae":
        module = RiaeLoss(RIAE(RIAE_CONFIG, 1), seed=0)
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
    """Gradient norms of steps first … last − 1. Step i's samples depend on i alone, and are dealt out to the ranks.

    ``losses`` takes each step's, averaged over the whole batch.
    """
    norms = []
    for step in range(first, last):
        drawn = torch.randn(
            BATCH, 1 if stage == "riae" else 3, 5, 4, generator=torch.Generator().manual_seed(step)
        )
        index = torch.arange(BATCH) + step * BATCH
        micro_batches = torch.arange(BATCH)[world.rank :: world.world_size].split(MICRO)
        total = torch.zeros(())
        for some in micro_batches:
            batch = {"index": index[some], "step": step}
            batch |= (
                {"image": drawn[some]}
                if stage == "riae"
                else {"latent": drawn[some], "condition": index[some] % 2}
            )
            loss, figures = engine.forward(batch)
            assert not any(figure.requires_grad for figure in figures.values())
            engine.backward(loss, len(micro_batches))
            total += loss.detach() * len(some) / BATCH
        if losses is not None:
            losses.append(float(dist.all_reduce_sum(total)))
        norms.append(float(engine.step(1e-3 * (step + 1), step)))
    return norms


def save(folder: Path, state: EngineState) -> None:
    """To FOLDER/checkpoints."""
    meta = Meta(
        stage="riae", step=state.step, samples=state.step * BATCH, seed=0, config={}, model={}
    )
    writing.save(folder, state, meta, keep=9)


def train_stage(zero_stage: int, folder: Path, world: World) -> dict[str, list[float]]:
    """Train through; and again from the half-way checkpoint, at this stage and at the next."""
    engine = make("deepspeed", zero_stage, world)
    norms = run(engine, 0, HALF, world)
    save(folder, engine.state())
    norms += run(engine, HALF, STEPS, world)
    save(folder, engine.state())
    resumed = {}
    for other in (zero_stage, (zero_stage + 1) % 4):
        again = make("deepspeed", other, world)
        reading.resume(again, folder / "checkpoints" / f"step-{HALF:08d}")
        resumed[other] = run(again, HALF, STEPS, world)
        save(folder / f"resumed-at-{other}", again.state())
    return {"norms": norms, "same": resumed[zero_stage], "other": resumed[(zero_stage + 1) % 4]}


def train_rounded(zero_stage: int, folder: Path, world: World) -> dict[str, Any]:
    """Weights in bfloat16 with float32 masters: saved before the first step, half-way, and gone on from there."""
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
    reading.resume(again, folder)
    return {"norms": norms, "resumed": run(again, HALF, STEPS, world), "kinds": kinds}


def elastic(folder: Path, world: World) -> list[float]:
    """Losses of a run that changes its ZeRO stage at every step, and goes on in one process in between."""
    losses: list[float] = []
    for step, zero_stage in enumerate(ELASTIC):
        if zero_stage is None:
            if world.rank == 0:
                _step_alone(folder)
            dist.barrier()
            losses.append(json.loads((folder / "step.json").read_text()))
            continue
        engine = make("deepspeed", zero_stage, world)
        if step:
            reading.resume(engine, folder)
        run(engine, step, step + 1, world, losses=losses)
        save(folder, engine.state())
    return losses


def _step_alone(folder: Path) -> None:
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("TORCHELASTIC", "GROUP_", "ROLE_"))
    }
    subprocess.run([sys.executable, __file__, "--step", str(folder)], env=environment, check=True)


def step_alone(folder: Path) -> None:
    """One step in one process without DeepSpeed, from the newest checkpoint to the next one."""
    engine, losses = make("local", 0, ALONE), []
    reading.resume(engine, folder)
    run(engine, engine.steps, engine.steps + 1, ALONE, losses=losses)
    save(folder, engine.state())
    (folder / "step.json").write_text(json.dumps(losses[0]))


def spoil(zero_stage: int, world: World) -> bool:
    """One rank sees a picture that is not finite: both must stop, and no weight may have changed."""
    engine = make("deepspeed", zero_stage, world)
    run(engine, 0, 1, world)
    before = _copied(engine)
    image = torch.full((MICRO, 1, 5, 4), float("nan") if world.rank == 1 else 0.5)
    stopped = False
    try:
        for _ in range(2):
            engine.backward(
                engine.forward({"image": image, "index": torch.arange(MICRO), "step": 1})[0], 2
            )
        engine.step(1e-3, 1)
    except NonFiniteError as error:
        stopped = "step 1" in str(error)
    everyone = dist.all_reduce_sum(torch.tensor(float(stopped))) == world.world_size
    after = _copied(engine)
    return bool(everyone) and all(
        torch.equal(before[kind][name], after[kind][name])
        for kind in ("model", "ema")
        for name in before[kind]
    )


def _copied(engine: Engine) -> dict[str, dict[str, torch.Tensor]]:
    return {
        kind: {name: part.values.clone() for name, part in parts.items()}
        for kind, parts in engine.state().parts.items()
    }


def refuses_local(world: World) -> bool:
    try:
        make("local", 0, world)
    except InputError as error:
        return "one process" in str(error)
    return False


def main(folder: Path) -> None:
    world = dist.init()
    dist.barrier()
    number = torch.tensor(float(world.rank))
    result = {
        "sum": float(dist.all_reduce_sum(number)),
        "max": float(dist.all_reduce_max(number)),
        "kept": float(number),
        "broadcast": dist.broadcast_object({"rank": world.rank}),
        "main": dist.is_main(),
        "ranks": dist.world_size(),
        "refuses_local": refuses_local(world),
        "stages": {
            stage: train_stage(stage, folder / f"zero-{stage}", world) for stage in range(4)
        },
        "elastic": elastic(folder / "elastic", world),
        "spoilt": {stage: spoil(stage, world) for stage in range(4)},
        "bfloat16": {
            stage: run(make("deepspeed", stage, world, precision="bfloat16"), 0, STEPS, world)
            for stage in (1, 3)
        },
        "bfloat16_weights": {
            stage: train_rounded(stage, folder / f"rounded-{stage}", world) for stage in (2, 3)
        },
        "r2id": {
            stage: run(make("deepspeed", stage, world, "r2id"), 0, STEPS, world, "r2id")
            for stage in (2, 3)
        },
    }
    result["from_local"] = []
    for zero_stage, zero in LAYOUTS:
        from_local = make("deepspeed", zero_stage, world, **zero)
        reading.resume(from_local, folder / "local")
        result["from_local"].append(run(from_local, HALF, STEPS, world))
    result["loop"] = loop_ranks.every_stage(folder / "digits", folder / "loop")
    if dist.is_main():
        (folder / "result.json").write_text(json.dumps(result))
    dist.shutdown()


def alone(folder: Path) -> None:
    """DeepSpeed in a process that no launcher started."""
    world = dist.init()
    norms = {stage: run(make("deepspeed", stage, world), 0, STEPS, world) for stage in range(4)}
    (folder / "alone.json").write_text(json.dumps(norms))
    dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"--alone": alone, "--step": step_alone}.get(sys.argv[1], main)(Path(sys.argv[-1]))
