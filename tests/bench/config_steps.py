"""Training steps of the configs, with random weights: timed, or repeated after a checkpoint."""

import tempfile
import time
from pathlib import Path

import torch

from r2id import rng
from r2id.checkpoints import reading, writing
from r2id.checkpoints.files import Meta
from r2id.config import load_config
from r2id.training.blocks import prepare_blocks
from r2id.training.engines import make_engine
from r2id.training.meter import matmul_peak
from r2id.training.planner import memory
from r2id.training.workload import Dimensions, Workload, image_cost

CONFIGS = Path(__file__).parents[2] / "configs"
SECONDS = 3.0
"""Of steps that are timed."""
RIAES = {"mnist/reference-r2id": "mnist/reference-riae", "imagenet/r2id-b-512": "imagenet/riae-512"}
NARROW = {"riae": ["riae.width=16", "train.batch=2"], "r2id": ["r2id.width=32", "r2id.heads=2"]}
NARROW["r2id"] += ["r2id.encoder_blocks=2", "r2id.decoder_blocks=1", "train.batch=2"]


def workload(path, side, options, *overrides):
    """The steps of a config, of one micro-batch each."""
    narrow = NARROW["riae" if "riae" in path else "r2id"] if options.small else []
    config = load_config(
        CONFIGS / f"{path}.toml", [*narrow, "train.precision=bfloat16", *overrides]
    )
    count = min(config.train.batch, config.train.micro_batch or config.train.batch)
    config = load_config(
        CONFIGS / f"{path}.toml",
        [*narrow, "train.precision=bfloat16", f"train.batch={count}", *overrides],
    )
    riae = None
    if "r2id" in path:
        riae = load_config(CONFIGS / f"{RIAES.get(path, 'imagenet/riae-256')}.toml").riae
    side = 32 if options.small else side
    classes = 10 if path.startswith("mnist") else 1000
    return Workload(config, Dimensions((side, side), 1, classes, riae))


def engine_of(work, world):
    torch.manual_seed(0)
    config = work.config
    module = work.module()
    train = config.train.model_copy(update={"activation_checkpointing": "none"})  # done already
    prepare_blocks(module.model.blocks(), train, world.device)
    return make_engine(
        module, optim=config.optim, train=config.train, engine=config.engine, world=world
    )


def inputs_of(work, world):
    torch.manual_seed(1)
    made = work.inputs(work.config.train.batch)
    made = {k: torch.randn_like(v) if v.ndim == 4 else v for k, v in made.items()}
    # Samples' numbers stay on the CPU, as in training.
    return {k: v if k == "index" else v.to(world.device) for k, v in made.items()}


def steps(engine, inputs, first, last):
    for step in range(first, last):
        torch.manual_seed(int(rng.fold(0, step)))  # of dropout, as in training
        loss, _ = engine.forward({**inputs, "step": step})
        engine.backward(loss, 1)
        del loss, _
        engine.step(1e-4, step)
        engine.ema.update(step)


def wait(world):
    if world.device.type == "cuda":
        torch.cuda.synchronize()


def time_step(report, world, work, peak, flops, seconds, **names):
    """Time a step of so many ``flops`` per image for so many seconds; compare memory and plan."""
    cuda = world.device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    try:
        engine, inputs = engine_of(work, world), inputs_of(work, world)
        began = time.perf_counter()
        steps(engine, inputs, 0, 3)
        wait(world)
        start_up, began, done = time.perf_counter() - began, time.perf_counter(), 3
        while done < 6 or time.perf_counter() - began < seconds:
            steps(engine, inputs, done, done + 3)
            wait(world)
            done += 3
    except torch.cuda.OutOfMemoryError:
        report.add(**names, note="out of memory")
        return
    taken = (time.perf_counter() - began) / (done - 3)
    batch = work.config.train.batch
    row = {
        "batch": batch,
        "ms": taken * 1e3,
        "images/s": batch / taken,
        "share of peak": flops * batch / taken / peak,
        "first steps, s": start_up,
    }
    if cuda and work.config.train.compile is False:
        needed = memory(work, 1)
        planned, used = needed["total"] - needed.get("codec", 0), torch.cuda.max_memory_allocated()
        row |= {"GB": (used - before) / 1e9, "planned GB": planned / 1e9}
        row["planned / used"] = planned / (used - before)
    report.add(**names, **row)


def each_variant(report, world, path, side, options, variants):
    peak = matmul_peak(world.device, torch.bfloat16)
    flops = image_cost(workload(path, side, options)).flops
    seconds = 0.0 if options.small else SECONDS
    for name, overrides in variants.items():
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch._dynamo.reset()
        work = workload(path, side, options, *overrides)
        time_step(report, world, work, peak, flops, seconds, step=path, variant=name)


def same_bits(work, world):
    inputs, whole, again = inputs_of(work, world), engine_of(work, world), engine_of(work, world)
    with tempfile.TemporaryDirectory() as folder:
        steps(whole, inputs, 0, 2)
        meta = Meta(stage="riae", step=2, samples=2, seed=0, config={}, model={})
        writing.save(Path(folder), whole.state(), meta, keep=1)
        steps(whole, inputs, 2, 4)
        reading.resume(Path(folder), again.check, again.load)
        steps(again, inputs, 2, 4)
    pairs = zip(whole.masters, again.masters, strict=True)
    return all(torch.equal(one, other) for one, other in pairs)
