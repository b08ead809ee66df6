"""What the defaults are worth: one config trained with one thing changed at a time.

    python tests/bench/ablations.py configs/digits/riae.toml --out FOLDER [--steps 400]
        [--set section.key=value] [NAME ...]
    python tests/bench/ablations.py configs/digits/r2id.toml --out FOLDER …
    python tests/bench/ablations.py configs/photos/small-pipeline.toml --out FOLDER …

All variants train for the same number of steps. Of an RIAE it measures the PSNR of test images at
their own size, and of images at half their size that are decoded at their own, beside what bicubic
resizing makes of the decoded half. Of an R2ID it measures
class accuracy and Fréchet distance by a classifier of real images, at the training images' size and
at twice that, or at the sizes given by --size. With a pipeline's config, variants of its RIAE are
judged by an R2ID that is trained on their latents. Variants that are finished are not trained
again.
The table is Markdown; its figures are under "Ablations" in tests/bench/README.md.
"""

import argparse
import time
from pathlib import Path

import torch

from r2id.config import R2idRun, RiaeRun, load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import mse
from r2id.evaluation.r2id import Samples, measure_real_baseline, score_samples
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler
from r2id.training import pca, tasks
from r2id.training.encode import encode
from r2id.training.loop import train

IMAGES = 500


def natural(weights):
    """A PCA whose components keep their spread, with variance 1 on the mean."""
    scale = weights["from_code.weight"].norm(dim=0)
    ratio = (scale / scale.square().mean().sqrt()).unsqueeze(1)
    return weights | {
        "to_code.weight": weights["to_code.weight"] * ratio,
        "to_code.bias": weights["to_code.bias"] * ratio[:, 0],
        "from_code.weight": weights["from_code.weight"] / ratio.T,
    }


def natural_pca(*given, plain=pca.fit_pca):
    return natural(plain(*given))


def one_scale(encode, batches, plain=tasks.latent_statistics):
    """Statistics of latents with the same standard deviation for all channels."""
    stats = plain(encode, batches)
    return stats | {"std": stats["std"].square().mean().sqrt().expand_as(stats["std"]).clone()}


RIAE = {
    "as configured": [],
    "no PCA start": ['start="random"'],
    "no linear map": ["riae.linear=false"],
    "no network": ["riae.encoder_blocks=0", "riae.decoder_blocks=0"],
    "not lapped": ["riae.lapped=false"],
    "no features of points": ["riae.features=0"],
    "no smaller copies": ["loss.magnify=0.0"],
    "no latent noise": ["loss.latent_noise=0.0"],
    "latent noise 0.3": ["loss.latent_noise=0.3"],
    "equivariance": ["loss.equivariance=0.5"],
    "no equivariance": ["loss.equivariance=0.0"],
    "neither noise nor equivariance": ["loss.latent_noise=0.0", "loss.equivariance=0.0"],
    "one scale": [(pca, "fit_pca", natural_pca), (tasks, "latent_statistics", one_scale)],
    "mse": ['loss.pixel="mse"'],
    "texture": ["loss.texture=1.0"],
    "SSIM": ["loss.ssim=0.1"],
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
    "no levels": ["r2id.levels=[]"],
    "multiscale loss": ["diffusion.multiscale=2"],
    "condition by cross-attention": ['r2id.conditioning="cross"'],
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
    parser.add_argument("--r2id-steps", type=int, default=400, help="with a pipeline's config")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="of an R2ID, at each size")
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


def trained(options, stage, config, name, changes, steps):
    """Train a variant: its config, and the CPU seconds it took."""
    run = options.out / f"{stage}-{options.seed}-{''.join(c if c.isalnum() else '-' for c in name)}"
    fixed = [
        f"run={run}",
        f"seed={options.seed}",
        f"train.steps={steps}",
        f"train.save_every={steps}",
        "tracking.enabled=false",
        f"train.preview_every={steps}",
    ]
    config = load_config(config, [*(c for c in changes if isinstance(c, str)), *fixed])
    replaced = [change for change in changes if not isinstance(change, str)]
    plain = [(module, place, getattr(module, place)) for module, place, _ in replaced]
    for change in replaced:
        setattr(*change)
    began = time.process_time()
    try:
        train(config)
        return config, time.process_time() - began
    finally:
        for change in plain:
            setattr(*change)


def measure(config, options):
    shards = ShardSet.open(config.data.shards)
    if isinstance(config, RiaeRun):
        codec, errors = Codec.load(config.run), []
        for batch in eval_loader(
            shards, config.data, split=config.data.test_split, batch=50, limit=IMAGES
        ):
            images = batch["image"]
            own = (images.shape[2], images.shape[3])
            half = max(1, own[0] // 2), max(1, own[1] // 2)
            small = codec.encode(resize(images, half))
            pictures = (
                codec.decode(codec.encode(images), own),
                codec.decode(small, own, native=half),
                resize(codec.decode(small, half), own).clamp(-1, 1),
            )
            errors.append(torch.stack([mse(picture, images) for picture in pictures], 1))
        return [f"{value:.2f}" for value in psnr(torch.cat(errors)).mean(0).tolist()]
    assert isinstance(config, R2idRun)
    sampler = Sampler.load(config.run)
    native = sampler.codec.image
    data, found = config.data.model_copy(update={"latents": None}), []
    classifier = load_or_train_classifier(
        shards, data, options.out / "classifier.safetensors", torch.device("cpu")
    )
    real, _ = measure_real_baseline(classifier, shards, data, native, options.samples)
    samples = Samples(sampler, options.samples, 0)
    for at in options.size or [native, (2 * native[0], 2 * native[1])]:
        row = score_samples(samples, classifier, classifier, real, at)
        found += [f"{row['accuracy']:.3f}", f"{row['frechet']:.3g}"]
    return found


def through_r2id(options, name, changes):
    """Train a variant of a pipeline's RIAE and an R2ID on its latents: seconds and figures."""
    pipeline = load_config(options.config)
    folder = options.config.parent
    riae, seconds = trained(
        options, "riae", folder / pipeline.riae.config, name, changes, options.steps
    )
    latents = riae.run.with_name(riae.run.name.replace("riae", "latents"))
    encode(riae.run, riae.data.shards, latents)
    more = [f"codec={riae.run}", f"data.latents={latents}", f"data.shards={riae.data.shards}"]
    r2id, longer = trained(
        options, "r2id", folder / pipeline.r2id.config, name, more, options.r2id_steps
    )
    return seconds + longer, [*measure(riae, options), *measure(r2id, options)]


def main():
    options = arguments()
    stage = load_config(options.config).stage
    variants = {"r2id": R2ID}.get(stage, RIAE)
    places = [f"at {height}×{width}" for height, width in options.size] or ["", "at twice the size"]
    riae = ["PSNR", "half to whole", "bicubic of half"]
    r2id = [f"{figure} {place}".strip() for place in places for figure in ("accuracy", "Fréchet")]
    figures = {"riae": riae, "r2id": r2id, "pipeline": riae + r2id}[stage]
    rows = []
    for name in options.names or variants:
        changes = [*options.set, *variants[name]]
        if stage == "pipeline":
            seconds, found = through_r2id(options, name, changes)
        else:
            config, seconds = trained(options, stage, options.config, name, changes, options.steps)
            found = measure(config, options)
        rows.append(f"| {name} | {seconds:.0f} s | {' | '.join(found)} |")
        print(rows[-1], flush=True)
    print(f"\n| {options.config}, {options.steps} steps | training | {' | '.join(figures)} |")
    print(f"|{'---|' * (2 + len(figures))}")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
