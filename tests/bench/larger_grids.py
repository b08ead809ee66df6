"""What an R2ID draws on grids of more cells than it was trained on: one trained R2ID, same seeds.

    python tests/bench/larger_grids.py RUN --out FOLDER [--shards SHARDS] [--judge FILE]
        [--count 200] [--times 1.5 2]

Draws pictures on the trained grid and on grids of more cells a side: begun with the picture of the
trained grid, as `r2id sample RUN --grid` does, and from noise. They are drawn at the size of their
grid, resized to that of the training images, and scored by the classifier of real images (FILE is
one that an evaluation has kept). Samples are kept in OUT and not drawn again; what was interrupted
goes on. OUT/larger-grids.png shows the same seeds, a row for each grid and way. The table is
Markdown.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from kept_samples import draw_kept, sampling_arguments, score
from torch import Tensor

from r2id.checkpoints import Checkpoint
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.r2id import measure_real_baseline
from r2id.files import write_atomic
from r2id.images import resize, save_png, tile, to_float
from r2id.models.coords import Size
from r2id.sampling.conditions import choose_labels
from r2id.sampling.sampler import Sampler

SHOWN = 10


def arguments() -> argparse.Namespace:
    parser = sampling_arguments(__doc__, 200)
    parser.add_argument("--times", type=float, nargs="+", default=[1.5, 2.0], help="cells a side")
    return parser.parse_args()


def check_same_model(out: Path, run: Path) -> None:
    """Raise InputError where samples of another model are kept already."""
    file, identity = out / "model", Checkpoint.open(run).identity
    if file.is_file() and file.read_text() != identity:
        raise InputError(f"{out}: holds samples of another model: give another --out")
    write_atomic(file, identity.encode())


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    check_same_model(options.out, options.run)
    sampler = Sampler.load(options.run)
    if not sampler.num_classes:
        raise InputError(f"{options.run}: is not conditioned on classes, which are judged here")
    native, trained = sampler.codec.image, sampler.grid_for(sampler.codec.image)
    data = sampler.codec.data.model_copy(update={"latents": None, "size": native})
    shards = ShardSet.open(options.shards or data.shards)
    file = options.judge or options.out / "classifier.safetensors"
    judge = load_or_train_classifier(shards, data, file, torch.device("cpu"))
    real, floor = measure_real_baseline(judge, shards, data, native, options.count)
    labels = choose_labels((), options.count, sampler.num_classes)
    seeds = torch.arange(options.count)

    def samples(grid: Size, from_noise: bool) -> Tensor:
        size = sampler.codec.size_of(grid, native)

        def draw(rows: slice) -> Tensor:
            if from_noise:
                images = sampler.render(sampler.latents(labels[rows], seeds[rows], grid), size)
            else:
                images = sampler.sample(labels[rows], seeds[rows], size, grid=grid)
            return resize(images, native).clamp(-1, 1)

        name = f"samples-{grid[0]}x{grid[1]}{'-from-noise' if from_noise else ''}.safetensors"
        return draw_kept(options.out / name, options.count, draw)[0]

    print(
        f"{options.count} samples; real training images: Fréchet "
        f"{floor['frechet_of_training_images']:.3g}, recall "
        f"{floor['recall_of_training_images']:.2f}\n\n"
        "| grid | begun | Fréchet | times the trained grid's | accuracy | recall |\n"
        "|---|---|---|---|---|---|"
    )
    larger = [(round(trained[0] * times), round(trained[1] * times)) for times in options.times]
    ways = [(trained, True), *((grid, way) for grid in larger for way in (True, False))]
    shown, least = [], 0.0
    for grid, from_noise in ways:
        images = samples(grid, from_noise)
        row = score(judge, images, labels, real)
        least = least or row["frechet"]
        begun = "from noise" if from_noise else f"with the picture on {trained[0]}×{trained[1]}"
        print(
            f"| {grid[0]}×{grid[1]} | {begun} | {row['frechet']:.3g} | "
            f"{row['frechet'] / least:.2f} | {row['accuracy']:.3f} | {row['recall']:.2f} |",
            flush=True,
        )
        shown.append(to_float(images[:SHOWN]))
    save_png(tile(torch.cat(shown), len(shown[0])), options.out / "larger-grids.png")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
