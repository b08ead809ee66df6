"""Seconds and memory that saving and loading a checkpoint of a 46 M parameter R2ID take.

    torchrun --standalone --nproc-per-node 2 tests/bench/checkpoint.py FOLDER [engine.zero_stage]

Prints a line for each rank and turn: seconds, and by how much the process's peak memory rose above what it held. Pages of
files that loading maps are counted too. Linux only.
"""

import gc
import sys
import tempfile
import time
from pathlib import Path

import torch

from r2id import dist
from r2id.checkpoints import checkpoint
from r2id.config import DiffusionConfig, EngineConfig, OptimConfig, R2idConfig, TrainConfig
from r2id.models.r2id import R2ID
from r2id.training.engines import make_engine
from r2id.training.losses.r2id import R2idLoss


def memory(what):
    """VmRSS or VmHWM of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1000


def measure(name, work):
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    held = memory("VmRSS")
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    seconds = time.perf_counter() - began
    for line in dist.gather_objects(
        f"{name} rank {dist.rank()}: {seconds:.2f} s, +{memory('VmHWM') - held:.0f} MB"
    ):
        if dist.is_main():
            print(line)


def main():
    world, zero_stage = dist.init(), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    module = R2idLoss(
        R2ID(R2idConfig(width=512, encoder_blocks=4, decoder_blocks=4), 8, 10),
        DiffusionConfig(),
        4.0,
        0,
    )
    engine = make_engine(
        module,
        optim=OptimConfig(),
        train=TrainConfig(steps=1, batch=world.world_size),
        world=world,
        engine=EngineConfig(zero_stage=zero_stage),
    )
    index = torch.tensor([world.rank])
    inputs = {"latent": torch.randn(1, 8, 4, 4), "condition": index % 10, "index": index, "step": 0}
    engine.backward(engine.forward(inputs)[0], 1)
    engine.step(1e-4, 0)
    meta = checkpoint.Meta(stage="r2id", step=1, samples=1, seed=0, config={}, model={})
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1])) if dist.is_main() else None
    folder = dist.broadcast_object(folder)
    for _ in range(3):
        measure("save", lambda: checkpoint.save(folder, engine.state(), meta, keep=1))
    measure("load", lambda: checkpoint.load_into(engine, folder))
    dist.shutdown()


if __name__ == "__main__":
    main()
