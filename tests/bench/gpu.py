"""Everything worth knowing of a GPU, in one command of nine minutes at most.

    python tests/bench/gpu.py --out FOLDER [--minutes 9] [--only PART ...] [--small]

Writes FOLDER/gpu.md and gpu.json after every measurement, so that a cut keeps those before it. Each
part is a process of its own, which may fail or be stopped without the others. Models have random
weights. ``--small`` is for trying the command on a CPU.

    peak      bfloat16 products of large matrices
    mnist     a step of the reference RIAE and R2ID: eager, compiled, as a CUDA graph
    base      a step of R2ID-B on 256 tokens, with small and large batches, compiled or not, as a
              CUDA graph or not, with checkpointing or not, and memory beside what `r2id plan` says
    base-512  the same on 1,024 tokens
    xl        the same of R2ID-XL on 256 tokens
    sampling  the reference models at 32x32, and ten samples of 1024x1024 at once
    resume    whether a run that goes on has the bits of one that was not interrupted
    zero      a step with DeepSpeed's ZeRO 1 and 3 in one process, beside one without, all eager
    syncs     where a training step and a sample wait for the GPU
"""

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from config_steps import each_variant, engine_of, inputs_of, same_bits, steps, wait, workload

from r2id import dist
from r2id.files import write_atomic
from r2id.models.codec import Codec
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.sampling.sampler import Sampler
from r2id.training.determinism import deterministic
from r2id.training.meter import matmul_peak

SECONDS = {
    "peak": 20,
    "base": 160,
    "mnist": 100,
    "sampling": 50,
    "resume": 30,
    "syncs": 25,
    "zero": 45,
    "base-512": 80,
    "xl": 80,
}
"""Most that each part takes, by importance."""


class Report:
    """The measurements so far, in a folder."""

    def __init__(self, folder, part):
        self.folder, self.part = folder, part
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "gpu.json"
        self.rows = json.loads(file.read_text()) if file.is_file() else []

    def add(self, **row):
        self.rows.append({"part": self.part, **row})
        write_atomic(self.folder / "gpu.json", (json.dumps(self.rows, indent=1) + "\n").encode())
        write_atomic(self.folder / "gpu.md", markdown(self.rows).encode())
        print(json.dumps(self.rows[-1]), flush=True)


def markdown(rows):
    lines = []
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = [
            {k: v for k, v in row.items() if k != "part"} for row in rows if row["part"] == part
        ]
        heads = list(dict.fromkeys(key for row in mine for key in row))
        lines += [f"## {part}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join(cell(row.get(head)) for head in heads)} |" for row in mine]
        lines.append("")
    return "\n".join(lines)


def cell(value):
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def measure_peak(report, world, _options):
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "CPU"
    for dtype in (torch.bfloat16, torch.float32):
        tflops = matmul_peak(world.device, dtype) / 1e12
        report.add(device=device, torch=torch.__version__, products=str(dtype), tflops=tflops)


def measure_mnist(report, world, options):
    each_variant(report, world, "mnist/reference-riae", 32, options, variants_of(world, "riae"))
    each_variant(report, world, "mnist/reference-r2id", 32, options, variants_of(world, "r2id"))


def variants_of(world, stage):
    variants = {"eager": ["train.compile=false"], "compiled": ["train.compile=true"]}
    if stage == "r2id" and world.device.type == "cuda":
        variants["CUDA graph"] = ["train.compile=cuda_graphs"]
        variants["compiled, CUDA graph"] = ["train.compile=auto"]
    return variants


def measure_model(path, side):
    """Time the config's micro-batch, one that fills the GPU, and one that needs little memory."""

    def measure(report, world, options):
        variants = variants_of(world, "r2id")
        for count in () if options.small else (128, 256):
            for name in ("eager", "compiled, CUDA graph"):
                variants[f"{name}, batch {count}"] = [f"train.micro_batch={count}", *variants[name]]
        for name in ("eager", "compiled"):
            variants[f"{name}, checkpointing"] = [
                "train.activation_checkpointing=all",
                *variants[name],
            ]
        each_variant(report, world, path, side, options, variants)

    return measure


def reference_sampler(world, options):
    """The reference models with random weights."""
    work = workload("mnist/reference-r2id", 32, options)
    config, riae, device = work.config, work.dimensions.riae, world.device
    torch.manual_seed(0)
    channels = riae.latent_channels
    model = R2ID(config.r2id, channels, 10).to(device).eval().requires_grad_(False)
    codec = RIAE(riae, 1).to(device).eval().requires_grad_(False)
    mean, std = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    codec = Codec(codec, mean, std, True, None, None, (32, 32), config.data)
    cells = math.prod(work.grid())
    facts = {"base_side": cells**0.5, "areas": (cells, cells), "ratios": (1.0, 1.0)}
    return Sampler.of(model, codec, facts, config.diffusion, config.sample, True)


def draw(sampler, count, size, steps=None):
    device = sampler.codec.device
    seeds = torch.arange(count, device=device)
    return sampler.sample(seeds % 10, seeds, size, steps=steps)


def measure_sampling(report, world, options):
    sampler, cuda = reference_sampler(world, options), world.device.type == "cuda"
    for count, side in ((4, 32), (2, 64)) if options.small else ((256, 32), (10, 1024)):
        draw(sampler, min(count, 4), (32, 32), steps=2)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        wait(world)
        began = time.perf_counter()
        draw(sampler, count, (side, side), steps=2 if options.small else None)
        wait(world)
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        size = f"{side}x{side}"
        report.add(samples=count, size=size, seconds=seconds, per_second=count / seconds, GB=peak)


def measure_resume(report, world, options):
    """Four steps in deterministic mode, and two and two with a checkpoint between them."""
    cuda = world.device.type == "cuda"
    for path in ("mnist/reference-riae", "mnist/reference-r2id"):
        compiled = "cuda_graphs" if cuda and "r2id" in path else "false"
        work = workload(path, 32, options, f"train.compile={compiled}")
        try:
            with deterministic(True):
                same = same_bits(work, world)
        except RuntimeError as error:
            report.add(step=path, note=str(error).splitlines()[0])
        else:
            report.add(step=path, same_bits=same)


def measure_zero(report, world, options):
    eager = "train.compile=false"
    variants = {"local": [eager]}
    for stage in (1, 3):
        zero = ["engine.kind=deepspeed", f"engine.zero_stage={stage}"]
        variants[f"ZeRO {stage}"] = [eager, *zero]
    each_variant(report, world, "imagenet/r2id-b-256", 256, options, variants)


def measure_syncs(report, world, options):
    for path in ("mnist/reference-riae", "mnist/reference-r2id"):
        work = workload(path, 32, options)
        engine, inputs = engine_of(work, world), inputs_of(work, world)
        steps(engine, inputs, 0, 2)
        count_syncs(report, world, path, lambda e=engine, i=inputs: steps(e, i, 2, 3))
    sampler = reference_sampler(world, options)
    draw(sampler, 4, (32, 32), steps=2)
    count_syncs(
        report, world, "4 samples of 10 steps", lambda: draw(sampler, 4, (32, 32), steps=10)
    )


def count_syncs(report, world, name, work):
    if world.device.type != "cuda":
        work()
        report.add(work=name, note="a CPU has none")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        work()
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(w.filename).name}:{w.lineno}" for w in said if "synchroniz" in str(w.message)
    )
    report.add(work=name, syncs=sum(places.values()), places=str(dict(places.most_common(12))))


PARTS = {
    "peak": measure_peak,
    "mnist": measure_mnist,
    "base": measure_model("imagenet/r2id-b-256", 256),
    "base-512": measure_model("imagenet/r2id-b-512", 512),
    "xl": measure_model("imagenet/r2id-xl-256", 256),
    "sampling": measure_sampling,
    "resume": measure_resume,
    "zero": measure_zero,
    "syncs": measure_syncs,
}


def run_parts(options):
    """Run each part as a process; stop it after its time."""
    end = time.monotonic() + 60 * options.minutes
    for part in SECONDS:
        if part not in options.only:
            continue
        command = [sys.executable, __file__, "--out", str(options.out), "--part", part]
        limit = min(1.3 * SECONDS[part], end - time.monotonic())
        note = "no time left"
        if limit > 5:
            try:
                done = subprocess.run(
                    [*command, *(["--small"] if options.small else [])],
                    timeout=limit,
                    stderr=subprocess.PIPE,
                    text=True,
                    check=False,
                )
                note = done.returncode and f"failed: {(done.stderr.splitlines() or ['?'])[-1]}"
            except subprocess.TimeoutExpired:
                note = f"stopped after {limit:.0f} s"
        if note:
            Report(options.out, part).add(note=note)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is None:
        run_parts(options)
        return
    PARTS[options.part](Report(options.out, options.part), dist.init(), options)
    dist.shutdown()


if __name__ == "__main__":
    main()
