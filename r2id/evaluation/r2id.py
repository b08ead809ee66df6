"""How well R2ID makes images: its loss against time, and its samples in the eyes of a classifier of real images.

Shape letters: N samples · C colours · H, W image · L latent channels · h, w latent grid · D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Judge
from r2id.evaluation.images import load_images
from r2id.evaluation.metrics import class_accuracy, frechet_distance
from r2id.models.coords import Size
from r2id.progress import Progress
from r2id.sampling import Sampler, choose_labels

TIMES = tuple(round(0.05 + 0.1 * k, 2) for k in range(10))
"""Times of the scrape, from nearly data to nearly noise."""

_SCRAPED = 256  # test images, evenly spaced
_BATCH = 128
_MOST_REAL = 10_000  # test images that samples are compared with

Latents = Sequence[tuple[Tensor, Tensor]]
"""Batches of raw latents [N, L, h, w] and labels [N]."""


def encode_tests(sampler: Sampler, shards: ShardSet, data: DataConfig) -> Latents:
    """Latents of a few test images, with their labels, on the codec's device."""
    return [(sampler.codec.encode(batch["image"]), batch["label"].to(sampler.codec.device))
            for batch in eval_loader(shards, data, split=data.test_split, batch=_BATCH, limit=_SCRAPED)]


def scrape_times(sampler: Sampler, latents: Latents, times: Sequence[float] = TIMES, seed: int = 0) -> dict[str, Any]:
    """Mean loss of denoising test latents at each time ("t-scrape"), told their class, no class, or another class.

    The same noise for all, so that the curves differ by what they were told alone. Where they part, the class matters.
    """
    told: dict[str, Callable[[Tensor], Tensor]] = {"no class": lambda label: torch.full_like(label, -1)}
    if sampler.num_classes > 1:
        told = {"its class": lambda label: label, **told, "another class": lambda label: (label + 1) % sampler.num_classes}
    images = sum(len(label) for _, label in latents)
    losses: dict[str, list[float]] = {}
    with Progress("t-scrape", len(told) * len(times) * images, unit="images") as progress:
        for name, change in told.items():
            losses[name] = []
            for time in times:
                total = sum(float(sampler.loss_at(latent, change(label), time, seed + number).sum())
                            for number, (latent, label) in enumerate(latents))
                losses[name].append(total / images)
                progress.advance(images)
    return {"images": images, "time": list(times), "loss": losses}


def compare_real(judge: Judge, shards: ShardSet, data: DataConfig, count: int) -> tuple[Tensor, dict[str, Any]]:
    """Features [N, D] of real test images, and what to expect of perfect samples: the Fréchet distance from them to
    ``count`` real training images (fewer where there are no more)."""
    data = data.model_copy(update={"size": judge.size, "latents": None})
    real, _ = judge.look(load_images(shards, data, data.test_split, _MOST_REAL)[0])
    training, _ = judge.look(load_images(shards, data, data.train_split, count)[0])
    return real, {"test_images": len(real), "training_images": len(training),
                  "frechet_of_training_images": _distance(training, real)}


def score_samples(sampler: Sampler, judge: Judge, real: Tensor, size: Size, count: int, seed: int) -> dict[str, Any]:
    """Sample ``count`` images of a size, all classes in turn, seeds from ``seed`` on, and judge them.

    Accuracy (the share judged to be of the class asked for), the same per class, and the Fréchet distance to the
    features ``real`` [N, D]; None where too few images make none.
    """
    labels = choose_labels((), count, sampler.num_classes)
    seeds = torch.arange(seed, seed + count)
    features, judged = [], []
    with Progress(f"sample {size[0]}x{size[1]}", count, unit="images") as progress:
        for some, keys in zip(labels.split(_BATCH), seeds.split(_BATCH), strict=True):
            seen, classes = judge.look(sampler.sample(some, keys, size))
            features.append(seen)
            judged.append(classes)
            progress.advance(len(some))
    found = torch.cat(judged)
    return {"size": list(size), "grid": list(sampler.grid_for(size)), "samples": count,
            "accuracy": float((found == labels).double().mean()),
            "accuracy_per_class": class_accuracy(found, labels, sampler.num_classes),
            "frechet": _distance(torch.cat(features), real)}


def draw_samples(sampler: Sampler, sizes: Sequence[Size], count: int, seed: int) -> dict[Size, Tensor]:
    """The same seeds and classes, in turn, at every size: size → images [count, C, H, W]."""
    labels = choose_labels((), count, sampler.num_classes)
    seeds = torch.arange(seed, seed + count)
    return {size: sampler.sample(labels, seeds, size) for size in sizes}


def _distance(one: Tensor, other: Tensor) -> float | None:
    return frechet_distance(one, other) if min(len(one), len(other)) > 1 else None
