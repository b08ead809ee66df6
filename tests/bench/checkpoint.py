"""Seconds and memory that saving and loading a checkpoint of a 46 M parameter R2ID take.

    torchrun --standalone --nproc-per-node 2 tests/bench/checkpoint.py FOLDER [engine.zero_stage]

Prints a line for each rank and turn: seconds, and by how much the process's peak memory rose above
what it held. Pages of files that loading maps are counted too. Linux only. Its figures are under
"Speed and memory" in tests/bench/README.md.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import torch
from measure import reset_peak, resident

from r2id import dist
from r2id.checkpoints import reading, writing
from r2id.checkpoints.files import Meta
from r2id.config import DiffusionConfig, EngineConfig, OptimConfig, R2idConfig, TrainConfig
from r2id.models.r2id import R2ID
from r2id.training.engines import make_engine
from r2id.training.losses.r2id import R2idLoss


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("zero_stage", type=int, nargs="?", default=1)
    return parser.parse_args()


def measure(name, work):
    gc.collect()
    reset_peak()
    held = resident("VmRSS")
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    seconds = time.perf_counter() - began
    rise = (resident("VmHWM") - held) / 1e6
    for line in dist.gather_objects(f"{name} rank {dist.rank()}: {seconds:.2f} s, +{rise:.0f} MB"):
        if dist.is_main():
            print(line)


def main():
    options = arguments()
    world = dist.init()
    module = R2idLoss(
        R2ID(R2idConfig(width=512, encoder_blocks=4, decoder_blocks=4), 8, 10),
        DiffusionConfig(),
        4.0,
        0,
    )
    engine = make_engine(
        module,
        optim=OptimConfig(),
        train=TrainConfig(steps=1, batch=world.world_size, precision="float32"),
        world=world,
        engine=EngineConfig(zero_stage=options.zero_stage),
    )
    index = torch.tensor([world.rank])
    inputs = {"latent": torch.randn(1, 8, 4, 4), "condition": index % 10, "index": index, "step": 0}
    engine.backward(engine.forward(inputs)[0], 1)
    engine.step(1e-4, 0)
    meta = Meta(stage="r2id", step=1, samples=1, seed=0, config={}, model={})
    folder = Path(tempfile.mkdtemp(dir=options.folder)) if dist.is_main() else None
    folder = dist.broadcast_object(folder)
    for _ in range(3):
        measure("save", lambda: writing.save(folder, engine.state(), meta, keep=1))
    measure("load", lambda: reading.resume(folder, engine.check, engine.load))
    dist.shutdown()


if __name__ == "__main__":
    main()
