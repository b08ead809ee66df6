"""Memory that `r2id plan` predicts against what real training steps take.

    python tests/bench/plan_memory.py CONFIG [section.key=value ...] [--processes N]
        [--zero local 0 1 2 3] [--checkpointing none all] [--riae RIAE.toml] [--classes N] [--json]

On GPUs the measure is the most that CUDA's allocator handed out, on CPUs the most that the process
had in memory, each beyond what it had before the engine was made. Inputs are zeros of the config's
batch at its largest size; an R2ID run's codec, and what recordings of several sizes add, are left
out on both sides. For ImageNet's R2ID-B on eight GPUs of a machine, say:

    python tests/bench/plan_memory.py configs/imagenet/r2id-b-256.toml --processes 8
        --riae configs/imagenet/riae-256.toml --classes 1000 train.batch=256 train.micro_batch=32
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from measure import reset_peak, resident

from r2id import dist
from r2id.config import load_config
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.training.engines import make_engine
from r2id.training.planner import find_dimensions, memory
from r2id.training.workload import Workload

STEPS = 3


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--zero", nargs="+", default=["local", "0", "1", "2", "3"])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "all"])
    parser.add_argument("--riae", type=Path)
    parser.add_argument("--classes", type=int)
    parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args()


def train(work, world):
    """Three real steps; whatever they leave behind is for the caller to let go of."""
    config = work.config
    engine = make_engine(
        work.module(), optim=config.optim, train=config.train, engine=config.engine, world=world
    )
    count, samples = (
        accumulation(config.train, world.world_size),
        micro_batch_size(config.train, world.world_size),
    )
    inputs = {
        key: value.to(world.device)
        for key, value in work.inputs(samples * work.dimensions.copies).items()
    }
    for step in range(STEPS):
        for _ in range(count):
            loss, _ = engine.forward({**inputs, "step": step})
            engine.backward(loss, count)
            del loss, _
        engine.step(1e-4, step)
        engine.ema.update(step)


def measure(work, world):
    """Most bytes of any process."""
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(work, world)
        most = torch.cuda.max_memory_allocated() - before
    else:
        before = resident("VmRSS")
        reset_peak()
        train(work, world)
        most = resident("VmHWM") - before
    return max(dist.gather_objects(int(most)))


def rank(options):
    """Measure every case in this process, one of many; the first prints a line of JSON for each."""
    world = dist.init()
    for zero in options.zero:
        warm = False
        for checkpointing in options.checkpointing:
            kind = (
                ["engine.kind=local"]
                if zero == "local"
                else ["engine.kind=deepspeed", f"engine.zero_stage={zero}"]
            )
            config = load_config(
                options.config,
                [*options.overrides, *kind, f"train.activation_checkpointing={checkpointing}"],
            )
            work = Workload(config, find_dimensions(config, options.riae, options.classes))
            planned = memory(work, world.world_size, as_on_gpu=world.device.type == "cuda")
            if not warm:  # what libraries load and keep at their first use is of no step
                measure(work, world)
                warm = True
            measured = measure(work, world)
            if dist.is_main():
                total = planned["total"] - planned.get("codec", 0) - planned.get("recordings", 0)
                print(
                    json.dumps(
                        {
                            "zero": zero,
                            "checkpointing": checkpointing,
                            "processes": world.world_size,
                            "planned": total,
                            "measured": measured,
                            "ratio": total / measured,
                            "parts": planned,
                        }
                    ),
                    flush=True,
                )
    dist.shutdown()


def main():
    options = arguments()
    if "R2ID_PLAN_RANK" in os.environ:
        rank(options)
        return
    # A process is as large as its tensors when blocks of 64 KiB and more go back to the system at
    # once, and are written to when they come: as on a GPU, what is allocated counts.
    environment = {
        **os.environ,
        "R2ID_PLAN_RANK": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_PERTURB_": "1",
    }
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(options.processes),
    ]
    command = [sys.executable, *(launcher if options.processes > 1 else []), *sys.argv]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as job:
        for line in job.stdout:
            found = json.loads(line)
            print(
                line.strip()
                if options.json
                else "ZeRO {zero:5} checkpointing {checkpointing:4} on {processes}: ".format(
                    **found
                )
                + f"planned {found['planned'] / 1e6:.1f} MB, "
                f"measured {found['measured'] / 1e6:.1f} MB, ratio {found['ratio']:.3f}",
                flush=True,
            )
    sys.exit(job.returncode)


if __name__ == "__main__":
    main()
