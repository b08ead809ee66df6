"""Draw the pictures of the report: figures of what was measured, as PNG files by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from r2id.evaluation import figures
from r2id.evaluation.images import load_images
from r2id.evaluation.neighbours import Neighbours
from r2id.evaluation.provenance import Subject
from r2id.evaluation.r2id import Samples, draw_samples
from r2id.evaluation.riae import reconstruct_examples
from r2id.images import to_float
from r2id.models.coords import Size, scale_size
from r2id.sampling.sampler import Sampler

GRID_COUNT = 100  # samples shown per size
_LADDER_ROWS = 5  # seeds in the figure of one seed at many sizes
_SHOWN_BY_SIZE = {
    "accuracy": "class accuracy",
    "frechet": "Fréchet distance",
    "patch_frechet": "Fréchet distance of windows",
}

Pictures = dict[str, bytes]


def show_riae(subject: Subject) -> Pictures:
    """Draw reconstructions and latents of test images."""
    examples = reconstruct_examples(subject.codec, subject.shards, subject.riae_data)
    return {
        "reconstructions": figures.table(
            [examples.originals, *examples.rendered.values()], ["original", *examples.rendered]
        ),
        "latents": figures.latents(examples.latents[:4]),
    }


def show_samples(
    subject: Subject, samples: Samples, sizes: Sequence[Size], found: Mapping[str, Any]
) -> Pictures:
    """Draw the figures of an R2ID.

    They are a grid of samples per size, one seed at many sizes ("ladder"), the samples with the
    lowest scores, real images for comparison, and the loss curves.
    """
    drawn = draw_samples(samples.first(GRID_COUNT), sizes)
    sampler, own = samples.sampler, samples.sampler.codec.image
    others = [
        scale_size(own, scale) for scale in ((0.5, 0.5), (1, 1), (2, 2), (4, 4), (1.5, 1), (1, 1.5))
    ]
    # Sizes of the native aspect ratio come first, each group by increasing area.
    ladder = sorted(
        {*sizes, *others},
        key=lambda size: (size[0] * own[1] != size[1] * own[0], size[0] * size[1], size),
    )
    rungs = draw_samples(samples.first(_LADDER_ROWS), ladder)
    columns = min(10, sampler.num_classes) if sampler.num_classes > 1 else 10
    data = subject.data.model_copy(update={"size": own})
    real, _ = load_images(subject.shards, data, data.test_split, GRID_COUNT)
    return {
        "ladder": figures.table(
            [[rungs[size][row] for size in ladder] for row in range(_LADDER_ROWS)],
            [f"seed {subject.seed + row}" for row in range(_LADDER_ROWS)],
            [f"{height}×{width}" for height, width in ladder],
        ),
        **{
            f"samples_{size[0]}x{size[1]}": figures.grid(images, columns)
            for size, images in drawn.items()
        },
        "real": figures.grid(to_float(real), columns),
        **{
            f"failures_{name}": _show_failures(sampler, row, subject.shards.class_names)
            for name, row in found["sizes"].items()
            if row["lowest"]
        },
        "loss_by_time": figures.loss_by_time(found["loss_by_time"]),
        "loss_by_grid": figures.loss_by_grid(found["loss_by_grid"]),
    }


def _show_failures(sampler: Sampler, row: Mapping[str, Any], names: Sequence[str]) -> bytes:
    lowest = row["lowest"]
    labels, seeds = (torch.tensor([one[name] for one in lowest]) for name in ("label", "seed"))
    images = sampler.sample(labels, seeds, tuple(row["size"]))
    return figures.captioned(
        list(images),
        [
            f"{names[one['label']]}: {one['score']:.2g}\nas {names[one['predicted']]}"
            for one in lowest
        ],
    )


def show_invariance(found: Mapping[str, Any]) -> Pictures:
    """Draw the scores of samples by size."""
    if "r2id" not in found:
        return {}
    rows = found["r2id"]["sizes"]
    return {
        f"invariance_{name}": figures.size_curves(
            list(rows),
            {
                "samples": [row[name] for row in rows.values()],
                "real images stretched": [row["stretched"][name] for row in rows.values()],
            },
            words,
        )
        for name, words in _SHOWN_BY_SIZE.items()
        if all(row[name] is not None for row in rows.values())
    }


def show_neighbours(found: Neighbours) -> bytes:
    """Draw samples, each followed by the training images that are nearest to it."""
    images, captions = [], []
    for number, (sample, near) in enumerate(zip(found.samples, found.images, strict=True)):
        images += [sample, *near]
        captions += [f"sample {number + 1}", *(f"{d:.3g}" for d in found.distances[number])]
    return figures.captioned(images, captions, columns=2 * (1 + len(found.images[0])))
