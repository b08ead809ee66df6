"""Images per second of a training step, without data loading, logging and saving.

    python tests/bench/train_step.py configs/mnist/reference-riae.toml --size 32x32 [--steps 20]
        [--both-conditions] [--json] [section.key=value ...]

Random images (or latents) of the config's batch size; the engine is the one that training uses, in
as many processes as torchrun starts. The share is of what one process reaches in a large matrix
product. Memory is what the process takes at most, beyond what it has before it makes the model; on
a GPU it is what tensors take, which may be capped, to 16 of 140 GiB for instance:

    PYTORCH_CUDA_ALLOC_CONF=per_process_memory_fraction:0.114 python tests/bench/train_step.py
        configs/imagenet/r2id-b-512.toml --size 32x32 --channels 32 train.batch=32

Its figures are under "Speed and memory" in tests/bench/README.md.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from measure import baseline, rate, resident

from r2id import dist, rng
from r2id.cli.options import parse_size
from r2id.config import RiaeRun, load_config
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.diffusion.denoising import denoising_loss, draw_times, noise_levels
from r2id.models import coords
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import count_flops
from r2id.training.engines import make_engine
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import riae_loss
from r2id.training.meter import matmul_peak
from r2id.training.precision import resolve_precision

WARMUP = 3


class BothConditions(R2idLoss):
    """Every image under its class and under no condition, as the original project trains: encoder
    blocks run once for it and decoder blocks twice."""

    def forward(self, latent, condition, index, step):
        keys, grid = rng.fold(self.seed, step, index), latent.shape[2:]
        at = coords.grid_coordinates(grid, device=latent.device)
        at = coords.displace(
            at, self.model.config.jitter * rng.normal(rng.fold(keys, 0), len(at), 2), grid
        )
        labels = torch.stack([condition, torch.full_like(condition, -1)])

        def predict(x, alpha_bar, _labels, at, _cloud_key):
            return self.model.predict(x[: len(index)], alpha_bar[: len(index)], labels, at).flatten(
                0, 1
            )

        noise, times = (
            rng.normal(rng.fold(keys, 1), *latent.shape[1:]),
            draw_times(rng.fold(keys, 2), "uniform"),
        )
        side = (grid[0] * grid[1]) ** 0.5
        levels = noise_levels(self.diffusion, self.base_side, side, times.repeat(2))
        losses, _ = denoising_loss(
            predict,
            self.diffusion,
            levels.to(latent.device),
            latent.repeat(2, 1, 1, 1),
            labels,
            noise.repeat(2, 1, 1, 1),
            at,
        )
        return losses.mean(), {}


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--size", default="32x32", help="image size (riae) or latent grid (r2id)")
    parser.add_argument("--channels", type=int, default=64, help="latent channels (r2id)")
    parser.add_argument(
        "--both-conditions",
        action="store_true",
        help="every image under its class and under none (r2id)",
    )
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args()


def make_module(config, options, size, batch):
    """The module that a stage trains, and a micro-batch of its inputs."""
    index = torch.arange(batch)
    if isinstance(config, RiaeRun):
        module = riae_loss(RIAE(config.riae, config.data.channels), config.loss, 0)
        return module, {
            "image": torch.rand(batch, config.data.channels, *size) * 2 - 1,
            "index": index,
        }
    kind = BothConditions if options.both_conditions else R2idLoss
    module = kind(
        R2ID(config.r2id, options.channels, 10), config.diffusion, (size[0] * size[1]) ** 0.5, 0
    )
    return module, {
        "latent": torch.randn(batch, options.channels, *size),
        "condition": index % 10,
        "index": index,
    }


def speed(config, options, size, images_per_second, peak):
    """The model's own FLOP/s, and their share of the peak."""

    def forward():
        module, inputs = make_module(config, options, size, 1)
        return partial(module, **inputs, step=0)

    flops = 3 * count_flops(forward) * images_per_second
    return {"tflops": flops / 1e12, "mfu": flops / peak}


def main():
    options = arguments()
    size, world = parse_size(options.size), dist.init()
    config = resolve_precision(load_config(options.config, options.overrides), world.device)
    count, micro_batch = (
        accumulation(config.train, world.world_size),
        micro_batch_size(config.train, world.world_size),
    )
    peak = matmul_peak(world.device, torch.bfloat16 if config.train.autocast else torch.float32)
    before = baseline()
    module, inputs = make_module(config, options, size, micro_batch)
    parameters = sum(p.numel() for p in module.parameters())
    engine = make_engine(
        module, optim=config.optim, train=config.train, engine=config.engine, world=world
    )
    inputs = {key: value.to(world.device) for key, value in inputs.items()}

    def steps(number, first):
        for step in range(first, first + number):
            for _ in range(count):
                loss, _ = engine.forward({**inputs, "step": step})
                engine.backward(loss, count)
            norm = engine.step(1e-4, step)
            engine.ema.update(step)
        float(norm)

    found = {**rate(steps, options.steps, WARMUP, config.train.batch), "parameters": parameters}
    found["memory"] = resident("VmHWM") - before
    if world.device.type == "cuda":
        found["memory"] = torch.cuda.max_memory_allocated()
    found |= speed(config, options, size, found["images_per_second"] / world.world_size, peak)
    if dist.is_main():
        print(
            json.dumps(found)
            if options.json
            else f"{options.config}: {parameters / 1e6:.2f} M parameters, "
            f"batch {config.train.batch}, {size[0]}x{size[1]}: "
            "{ms:.1f} ms per step, {images_per_second:.1f} images/s, {tflops:.3g} TFLOP/s per "
            "process ({mfu:.1%}), memory {gib:.2f} GiB".format(**found, gib=found["memory"] / 2**30)
        )


if __name__ == "__main__":
    main()
