"""Time of a training step on GPUs, estimated without one: a roofline of every kernel.

    python tests/bench/roofline.py [--only NAME ...] [--json] [section.key=value ...]

The real step runs on tensors without contents, with the number formats and kernels of a GPU. Each
kernel takes the longer of its operations at the GPU's peak and its reads and writes at the GPU's
bandwidth; the step takes the longer of all kernels and of starting them, LAUNCH seconds each.
Compiled means that kernels of a block that follow one another and are no matrix products, are one:
what it reads from and writes for others counts once. The share of the peak is that of the model's
own operations, as `r2id plan` counts them.

Figures of GPUs are NVIDIA's, of dense products with float32 sums. A real kernel reaches less.
"""

import argparse
import json
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from r2id.config import load_config
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.models import tracing
from r2id.training.ema import decays
from r2id.training.workload import Dimensions, Workload, image_cost, parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
LAUNCH = 5e-6
UPDATE = 40  # bytes per weight: clipping reads and writes gradients, AdamW reads 16 and writes 12
AVERAGE = 12  # bytes per weight and average


@dataclass(frozen=True)
class Gpu:
    """Peaks in FLOP/s of bfloat16 and float32 products, bandwidth of the memory in bytes/s."""

    bfloat16: float
    float32: float
    bandwidth: float


GPUS = {"H100 SXM": Gpu(989e12, 67e12, 3.35e12), "RTX 5080": Gpu(112.6e12, 56.3e12, 0.96e12)}

# Name → config, the RIAE's of an R2ID, and the side of the images.
CASES = {
    "MNIST RIAE": ("mnist/reference-riae", None, 32),
    "MNIST R2ID": ("mnist/reference-r2id", "mnist/reference-riae", 32),
    "R2ID-B, 256 tokens": ("imagenet/r2id-b-256", "imagenet/riae-256", 256),
    "R2ID-B, 1,024 tokens": ("imagenet/r2id-b-512", "imagenet/riae-512", 512),
    "R2ID-XL, 256 tokens": ("imagenet/r2id-xl-256", "imagenet/riae-256", 256),
    "R2ID-XL, 1,024 tokens": ("imagenet/r2id-xl-512", "imagenet/riae-512", 512),
    "ImageNet RIAE": ("imagenet/riae-256", None, 256),
}

FREE = {"detach", "empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "alias"}
FREE |= {"_unsafe_view", "lift_fresh", "device", "scalar_tensor"}
ATTENTION = "_scaled_dot_product"


@dataclass
class Kernel:
    """One kernel: its operations, and what it reads and writes as {storage: bytes}."""

    name: str
    block: int | None
    flops: int = 0
    wide: bool = False  # float32 products
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)

    def seconds(self, gpu):
        moved = sum(self.reads.values()) + sum(self.writes.values())
        peak = gpu.float32 if self.wide else gpu.bfloat16
        return max(self.flops / peak, moved / gpu.bandwidth)


class Kernels(tracing._Ledger):
    """Lists the kernels that run, with the pass of a block that each belongs to."""

    def __init__(self):
        super().__init__()
        self.list, self.block, self.passes = [], None, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(func, types, args, kwargs)
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE and func.namespace == "aten":
            kernel = Kernel(name, self.block)
            inputs = tensors((args, kwargs or {}))
            kernel.reads = {self.number(tensor): size(tensor) for tensor in inputs}
            kernel.writes = {self.number(tensor): size(tensor) for tensor in tensors(made)}
            kernel.flops = flops(func, args, kwargs or {}, made)
            kernel.wide = inputs != [] and inputs[0].dtype == torch.float32
            self.list.append(kernel)
        return made

    def enter(self, *_):
        self.passes += 1
        self.block = self.passes

    def leave(self, *_):
        self.block = None


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def size(tensor):
    """Bytes, of which an expanded tensor has few."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def flops(func, args, kwargs, made):
    name = func.overloadpacket.__name__
    if name.startswith(ATTENTION):  # products of N·M·d: two forwards, five backwards
        backward = "backward" in name
        q, k = (args[1], args[2]) if backward else (args[0], args[1])
        return (10 if backward else 4) * q.numel() * k.shape[-2]
    count = flop_registry.get(func.overloadpacket)
    return 0 if count is None else int(count(*args, **kwargs, out_val=made))


def trace(workload, samples):
    """The kernels of a micro-batch's forward and backward pass."""
    with ExitStack() as stack:
        stack.enter_context(tracing.FakeTensorMode())
        stack.enter_context(tracing.plain_up_to(0))
        stack.enter_context(tracing._KernelsOfGpu())
        kernels = stack.enter_context(Kernels())
        module, inputs = workload.module(), workload.inputs(samples)
        for block in module.model.blocks():
            block.register_forward_pre_hook(kernels.enter)
            block.register_forward_hook(kernels.leave)
            block.register_full_backward_pre_hook(kernels.enter)
            block.register_full_backward_hook(kernels.leave)
        kernels.list.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=workload.config.train.autocast):
            loss, _ = module(**inputs, step=0)
        loss.backward()
    return kernels.list


def compiled(kernels):
    """Make one kernel of those of a block that follow one another and are no products."""
    runs = []
    for kernel in kernels:
        last = runs[-1][-1] if runs else None
        fused = last and not (kernel.flops or last.flops) and kernel.block == last.block is not None
        if fused:
            runs[-1].append(kernel)
        else:
            runs.append([kernel])
    last_read = {}
    for number, run in enumerate(runs):
        for kernel in run:
            last_read |= dict.fromkeys(kernel.reads, number)
    return [one_of(run, number, last_read) for number, run in enumerate(runs)]


def one_of(run, number, last_read):
    """One kernel of several. What nobody reads after it is not written, if it is made in it."""
    if len(run) == 1:
        return run[0]
    found, made = Kernel("fused", run[0].block), {}
    for kernel in run:
        found.reads |= {key: v for key, v in kernel.reads.items() if key not in made}
        made |= kernel.writes
    found.writes = {key: v for key, v in made.items() if last_read.get(key, number) > number}
    return found


def estimate(name, overrides):
    path, riae, side = CASES[name]
    config = load_config(CONFIGS / f"{path}.toml", [*overrides, "train.precision=bfloat16"])
    codec = load_config(CONFIGS / f"{riae}.toml").riae if riae else None
    classes = 10 if path.startswith("mnist") else 1000
    workload = Workload(config, Dimensions((side, side), 1, classes, codec))
    count, samples = accumulation(config.train, 1), micro_batch_size(config.train, 1)
    kernels = trace(workload, samples)
    with torch.device("meta"):
        weights = parameter_count(workload.module())
    update = weights * (UPDATE + AVERAGE * len(decays(config.train)))
    useful = image_cost(workload).flops * config.train.batch
    row = {"name": name, "batch": config.train.batch, "tflop": useful / 1e12, "gpus": {}}
    for kind, listed in (("eager", kernels), ("compiled", compiled(kernels))):
        row[f"{kind}_kernels"] = len(listed) * count
        for gpu_name, gpu in GPUS.items():
            running = count * math.fsum(kernel.seconds(gpu) for kernel in listed)
            running += update / gpu.bandwidth
            step = max(running, LAUNCH * len(listed) * count)
            row["gpus"].setdefault(gpu_name, {})[kind] = {
                "ms": step * 1e3,
                "kernels_ms": running * 1e3,
                "share": useful / step / gpu.bfloat16,
                "host_bound": step > running,
            }
    return row


def cell(found):
    ms = found["ms"]
    spent = f"{ms:.3g} ms" if ms < 999 else f"{ms / 1e3:.3g} s"
    return f"{spent}, {found['share']:.2f}" + (" ¹" if found["host_bound"] else "")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    heads = [f"{gpu}, {kind}" for gpu in GPUS for kind in ("eager", "compiled blocks")]
    if not options.json:
        print("| step | kernels, eager and compiled |", *(f" {head} |" for head in heads), sep="")
        print("|---|---|" + "---|" * len(heads))
    for name in options.only:
        row = estimate(name, options.overrides)
        if options.json:
            print(json.dumps(row), flush=True)
            continue
        cells = [cell(row["gpus"][gpu][kind]) for gpu in GPUS for kind in ("eager", "compiled")]
        counts = f"{row['eager_kernels']:,}, {row['compiled_kernels']:,}"
        print(f"| {name}, batch {row['batch']} | {counts} | {' | '.join(cells)} |", flush=True)
    if not options.json:
        print("\n¹ bound by the host, which starts the kernels.")


if __name__ == "__main__":
    main()
