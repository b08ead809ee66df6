"""What the defaults are worth: one config trained with one thing changed at a time.

    python tests/bench/ablations.py configs/digits/riae.toml --out FOLDER [--steps 400]
        [--set section.key=value] [NAME ...]
    python tests/bench/ablations.py configs/digits/r2id.toml --out FOLDER …

All variants train for the same number of steps. Of an RIAE it measures the squared error on test
images, at their own size and at twice that size against the images resized. Of an R2ID it measures
class accuracy and Fréchet distance by a classifier of real images, at the training images' size and
at twice that, or at the sizes given by --size. Variants that are finished are not trained again.
The table is Markdown; its figures are under "Ablations" in tests/bench/README.md.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from r2id.config import R2idRun, RiaeRun, load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import mse
from r2id.evaluation.r2id import Samples, measure_real_baseline, score_samples
from r2id.models import coords
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler
from r2id.training.loop import train

IMAGES, SAMPLES = 500, 500


def edge_aligned(count, device=None, part=slice(None)):
    """The original project's grid: the first and the last pixel on the edges."""
    return (
        torch.linspace(-0.5, 0.5, count, device=device)[part]
        if count > 1
        else torch.zeros(1, device=device)
    )


def independent(coordinates, noise, grid, shape=None):
    """Displace the absolute and the relative place of a point by different amounts."""
    step = noise * torch.tensor([0.5 / grid[1], 0.5 / grid[0]], device=noise.device)
    return coordinates + torch.cat(
        [step, step.roll(1, dims=-2) * coords.relative_scale(shape or grid)], dim=-1
    )


RIAE = {
    "as configured": [],
    "no window (`gaussian_window`)": ["riae.gaussian_window=false"],
    "no jitter": ["loss.jitter=0.0"],
    "no jitter, edge-aligned grid": ["loss.jitter=0.0", ("centres", edge_aligned)],
    "independent jitter": [("displace", independent)],
    "encoder sees 1/16": ["loss.encode_cloud=0.0625"],
    "encoder sees 1/4": ["loss.encode_cloud=0.25"],
    "encoder sees all": ["loss.encode_cloud=1.0"],
    "decoder sees 1/4 of the latents": ["loss.decode_cloud=0.25"],
    "tiled attention": ['riae.attention="tiled"', "riae.halo=1.0"],
    "a latent block": ["riae.latent_blocks=1"],
    "at many scales, cells told": [
        "loss.encode_scales=[0.5,1.0]",
        "riae.decode_scales=[0.5,2.0]",
        "riae.condition_on_pixel_size=true",
    ],
    "at many scales, cells not told": [
        "loss.encode_scales=[0.5,1.0]",
        "riae.decode_scales=[0.5,2.0]",
        "riae.condition_on_pixel_size=false",
    ],
    "l1": ['loss.pixel="l1"'],
    "texture": ["loss.texture=1.0"],
}


def diffusion(objective, schedule, *more):
    return [f'diffusion.objective="{objective}"', f'diffusion.schedule="{schedule}"', *more]


R2ID = {
    "as configured": [],
    "uniform times": ['diffusion.time_sampling="uniform"'],
    "v, cosine": diffusion("v", "cosine"),
    "ε, cosine": diffusion("epsilon", "cosine"),
    "x₀, cosine": diffusion("x0", "cosine"),
    "v, cosine, min-SNR": diffusion("v", "cosine", 'diffusion.weighting="min_snr"'),
    "v, linear β": diffusion("v", "linear_beta"),
    "no jitter": ["r2id.jitter=0.0"],
    "jitter 1": ["r2id.jitter=1.0"],
    "axial": ['r2id.attention=["axial"]'],
    "linear": ['r2id.attention=["linear"]'],
    "cloud of 8 tokens": ['r2id.attention=["cloud"]', "r2id.cloud_tokens=8"],
    "tiled and full in turn": ['r2id.attention=["tiled","full"]', "r2id.tile=2", "r2id.halo=1"],
    "no noise shift": ["diffusion.shift_exponent=0"],
    "noise shift 0.5": ["diffusion.shift_exponent=0.5"],
    "noise shift 1": ["diffusion.shift_exponent=1"],
}


def size(text):
    height, width = map(int, text.split("x"))
    return height, width


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("names", nargs="*", help="some of the variants; default all")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--size",
        action="append",
        type=size,
        default=[],
        metavar="HxW",
        help="where an R2ID is measured",
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    return parser.parse_intermixed_args()


def trained(options, name, changes):
    """Train a variant: its config, the seconds it took and its figures."""
    run = options.out / "".join(c if c.isalnum() else "-" for c in name)
    fixed = [
        f"run={run}",
        f"train.steps={options.steps}",
        "tracking.enabled=false",
        f"train.preview_every={options.steps}",
    ]
    config = load_config(
        options.config, [*options.set, *(c for c in changes if isinstance(c, str)), *fixed]
    )
    plain: dict[str, Callable] = {
        change[0]: getattr(coords, change[0]) for change in changes if not isinstance(change, str)
    }
    for change in changes:
        if not isinstance(change, str):
            setattr(coords, *change)
    began = time.perf_counter()
    try:
        train(config)
        return config, time.perf_counter() - began, measure(config, options)
    finally:
        for place, function in plain.items():
            setattr(coords, place, function)


def measure(config, options):
    shards = ShardSet.open(config.data.shards)
    if isinstance(config, RiaeRun):
        codec, errors = Codec.load(config.run), []
        for batch in eval_loader(
            shards, config.data, split=config.data.test_split, batch=50, limit=IMAGES
        ):
            images = batch["image"]
            size, latents = (images.shape[2], images.shape[3]), codec.encode(images)
            twice = 2 * size[0], 2 * size[1]
            errors.append(
                torch.stack(
                    [
                        mse(codec.decode(latents, size), images),
                        mse(codec.decode(latents, twice), resize(images, twice)),
                    ],
                    1,
                )
            )
        return [f"{value:.4f}" for value in torch.cat(errors).mean(0).tolist()]
    assert isinstance(config, R2idRun)
    sampler = Sampler.load(config.run)
    native = sampler.codec.image
    data, found = config.data.model_copy(update={"latents": None}), []
    classifier = load_or_train_classifier(
        shards, data, options.out / "classifier.safetensors", torch.device("cpu")
    )
    real, _ = measure_real_baseline(classifier, shards, data, native, SAMPLES)
    samples = Samples(sampler, SAMPLES, 0)
    for at in options.size or [native, (2 * native[0], 2 * native[1])]:
        row = score_samples(samples, classifier, classifier, real, at)
        found += [f"{row['accuracy']:.3f}", f"{row['frechet']:.3g}"]
    return found


def main():
    options = arguments()
    stage = load_config(options.config).stage
    variants = {"riae": RIAE, "r2id": R2ID}[stage]
    places = [f"at {height}×{width}" for height, width in options.size] or ["", "at twice the size"]
    figures = {
        "riae": ["test MSE", "at twice the size"],
        "r2id": [
            f"{figure} {place}".strip() for place in places for figure in ("accuracy", "Fréchet")
        ],
    }[stage]
    rows = []
    for name in options.names or variants:
        _, seconds, found = trained(options, name, variants[name])
        rows.append(f"| {name} | {seconds:.0f} s | {' | '.join(found)} |")
        print(rows[-1], flush=True)
    print(f"\n| {options.config}, {options.steps} steps | training | {' | '.join(figures)} |")
    print(f"|{'---|' * (2 + len(figures))}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
