"""Images per second of a training step, without data loading, logging and saving.

    python tests/bench/train_step.py configs/mnist/reference-riae.toml --size 32x32 [--steps 20] [section.key=value ...]

Random images (or latents) of the config's batch size; the engine is the one that training uses.
"""

import argparse
import time
from pathlib import Path

import torch

from r2id import dist
from r2id.cli.options import parse_size
from r2id.config import RiaeRun, load_config
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.training.engine import make_engine
from r2id.training.losses import R2idLoss, RiaeLoss
from r2id.training.meter import peak_memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--size", default="32x32", help="image size (riae) or latent grid (r2id)")
    parser.add_argument("--channels", type=int, default=64, help="latent channels (r2id)")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_intermixed_args()
    config = load_config(arguments.config, arguments.overrides)
    size, batch, world = parse_size(arguments.size), config.train.batch, dist.init()
    index = torch.arange(batch)
    if isinstance(config, RiaeRun):
        module = RiaeLoss(RIAE(config.riae, config.data.channels), 0)
        inputs = {"image": torch.rand(batch, config.data.channels, *size) * 2 - 1, "index": index}
    else:
        module = R2idLoss(R2ID(config.r2id, arguments.channels, 10), config.diffusion, (size[0] * size[1]) ** 0.5, 0)
        inputs = {"latent": torch.randn(batch, arguments.channels, *size), "label": index % 10, "index": index}
    parameters = sum(p.numel() for p in module.parameters())
    engine = make_engine(module, optim=config.optim, train=config.train, engine=config.engine, world=world)
    inputs = {key: value.to(world.device) for key, value in inputs.items()}

    def steps(count, first):
        for step in range(first, first + count):
            loss, _ = engine.forward({**inputs, "step": step})
            engine.backward(loss, 1)
            norm = engine.step(1e-4, step)
        return float(norm)

    steps(5, 0)
    began = time.perf_counter()
    steps(arguments.steps, 5)
    seconds = time.perf_counter() - began
    print(f"{arguments.config}: {parameters / 1e6:.2f} M parameters, batch {batch}, {size[0]}x{size[1]}: "
          f"{seconds / arguments.steps * 1e3:.1f} ms per step, {batch * arguments.steps / seconds:.1f} images/s, "
          f"peak memory {peak_memory(world.device) / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
