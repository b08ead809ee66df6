"""How well R2ID makes images: its loss against time, and its samples in the eyes of a classifier of real images.

Shape letters: N samples · C colours · H, W image · L latent channels · h, w latent grid · D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.diffusion import schedule
from r2id.evaluation.classifier import Judge
from r2id.evaluation.extractor import Extractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import class_accuracy
from r2id.evaluation.reference import BATCH, MOST_REAL, Seen, compare, real_batches, see
from r2id.evaluation.riae import scaled
from r2id.models.coords import Size
from r2id.progress import Progress
from r2id.sampling.conditions import choose_labels
from r2id.sampling.sampler import Sampler

TIMES = tuple(round(0.05 + 0.1 * k, 2) for k in range(10))
"""Times of the scrape, from nearly data to nearly noise."""

TOLD = ("its class", "no class", "another class")

_SCRAPED = 256  # test images, evenly spaced
_LOWEST = 20  # samples of the lowest scores that are named

Latents = Sequence[tuple[Tensor, Tensor]]
"""Batches of raw latents [N, L, h, w] and labels [N]."""


def encode_tests(sampler: Sampler, shards: ShardSet, data: DataConfig) -> Latents:
    """Latents of a few test images, with their labels, on the codec's device."""
    return [
        (sampler.codec.encode(batch["image"]), batch["label"].to(sampler.codec.device))
        for batch in eval_loader(shards, data, split=data.test_split, batch=BATCH, limit=_SCRAPED)
    ]


def encode_resized(
    sampler: Sampler, shards: ShardSet, data: DataConfig, size: Size, limit: int
) -> Latents:
    """Latents, on the codec's own grid, of a few test images brought to a size, with their labels, on its device."""
    grid = sampler.codec.grid_for(size)
    return [
        (sampler.codec.encode(resize(images, size), grid), labels.to(sampler.codec.device))
        for images, labels in real_batches(
            shards, data, data.test_split, sampler.codec.image, limit
        )
    ]


def scrape_times(
    sampler: Sampler,
    latents: Latents,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    told: Sequence[str] = TOLD,
) -> dict[str, Any]:
    """Mean loss of denoising test latents at each time ("t-scrape"), told their class, no class, or another class.

    The same noise for all, so that the curves differ by what they were told alone. Where they part, the class matters.
    A model without classes can be told no class only.
    """
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "no class": lambda label: torch.full_like(label, -1)
    }
    if sampler.num_classes > 1:
        changes |= {
            "its class": lambda label: label,
            "another class": lambda label: (label + 1) % sampler.num_classes,
        }
    changes = {name: changes[name] for name in told if name in changes}
    images = sum(len(label) for _, label in latents)
    losses: dict[str, list[float]] = {}
    with Progress("t-scrape", len(changes) * len(times) * images, unit="images") as progress:
        for name, change in changes.items():
            losses[name] = []
            for time in times:
                total = sum(
                    float(sampler.loss_at(latent, change(label), time, seed + number).sum())
                    for number, (latent, label) in enumerate(latents)
                )
                losses[name].append(total / images)
                progress.advance(images)
    return {"images": images, "time": list(times), "loss": losses}


def scrape_grids(
    sampler: Sampler,
    shards: ShardSet,
    data: DataConfig,
    times: Sequence[float] = TIMES,
    seed: int = 0,
) -> dict[str, Any]:
    """Mean loss of denoising test latents of three latent grids, told their class, against logSNR.

    The grids are the codec's own of the images at half, at their own and at double size. Where the curves coincide, one
    amount of noise is one problem whatever the grid.
    """
    curves = {}
    for factor in (0.5, 1.0, 2.0):
        size = scaled(sampler.codec.image, (factor, factor))
        grid = sampler.codec.grid_for(size)
        name = f"{grid[0]}x{grid[1]}"
        if name in curves:
            continue
        told = scrape_times(
            sampler,
            encode_resized(sampler, shards, data, size, _SCRAPED),
            times,
            seed,
            told=("its class" if sampler.num_classes > 1 else "no class",),
        )
        shift = schedule.size_shift(
            (grid[0] * grid[1]) ** 0.5, sampler.base_side, sampler.diffusion.shift_exponent
        )
        curves[name] = {
            "images": told["images"],
            "size": list(size),
            "loss": next(iter(told["loss"].values())),
            "log_snr": schedule.log_snr(
                torch.tensor(times), sampler.diffusion.schedule, shift
            ).tolist(),
        }
    return {"time": list(times), "told": next(iter(told["loss"])), "grids": curves}


def compare_real(
    extractor: Extractor, shards: ShardSet, data: DataConfig, size: Size, count: int
) -> tuple[Seen, dict[str, Any]]:
    """Real test images at a size, and what to expect of perfect samples: how far ``count`` real training images (fewer
    where there are no more) are from them."""

    def read(split: str, limit: int) -> Seen:
        return see(
            extractor, (images for images, _ in real_batches(shards, data, split, size, limit))
        )

    real, training = read(data.test_split, MOST_REAL), read(data.train_split, count)
    return real, {
        "test_images": len(real),
        "training_images": len(training),
        **{f"{name}_of_training_images": value for name, value in compare(training, real).items()},
    }


class Samples:
    """``count`` samples, all classes in turn, seeds from ``seed`` on, at any sizes: what is diffused is computed once for
    each latent grid, and rendered at every size that has it."""

    def __init__(self, sampler: Sampler, count: int, seed: int) -> None:
        self.sampler = sampler
        self.labels, self.seeds = (
            choose_labels((), count, sampler.num_classes),
            torch.arange(seed, seed + count),
        )
        self._latents: dict[Size, Tensor] = {}  # of the first seeds, as many as were asked for yet

    def __len__(self) -> int:
        return len(self.seeds)

    def first(self, count: int) -> Samples:
        """The first of them, or more; what either computes, the other has."""
        samples = Samples(self.sampler, count, int(self.seeds[0]))
        samples._latents = self._latents
        return samples

    def batches(self, size: Size, length: int | None = None) -> Iterator[Tensor]:
        """Images [N, C, H, W] of a size, ``length`` at a time or as many as are rendered together."""
        latents = self._drawn(self.sampler.grid_for(size))
        with Progress(f"render {size[0]}x{size[1]}", len(self), unit="images") as progress:
            for some in latents.split(length or self.sampler.batch_length(size)):
                yield self.sampler.render(some, size)
                progress.advance(len(some))

    def _drawn(self, grid: Size) -> Tensor:
        parts = [self._latents[grid]] if grid in self._latents else []
        known = sum(map(len, parts))
        if known < len(self):
            with Progress(
                f"sample {grid[0]}x{grid[1]} latents", len(self) - known, unit="samples"
            ) as progress:
                for labels, seeds in zip(
                    self.labels[known:].split(BATCH), self.seeds[known:].split(BATCH), strict=True
                ):
                    parts.append(self.sampler.latents(labels, seeds, grid))
                    progress.advance(len(seeds))
            self._latents[grid] = torch.cat(parts)
        return self._latents[grid][: len(self)]


def score_samples(
    samples: Samples, judge: Judge | None, extractor: Extractor, real: Seen, size: Size
) -> dict[str, Any]:
    """Judge samples of a size.

    Accuracy (the share judged to be of the class asked for), the same per class, the samples of the lowest probability of
    that class, and how far all are from real ones (see compare). None where there is no judge or too few images make none.
    """
    probabilities: list[Tensor] = []

    def judged() -> Iterator[Tensor]:
        for images in samples.batches(size):
            if judge:
                probabilities.append(judge.probabilities(judge.features(images)))
            yield images

    seen, sampler = see(extractor, judged()), samples.sampler
    return {
        "size": list(size),
        "grid": list(sampler.grid_for(size)),
        "samples": len(samples),
        "first_seed": int(samples.seeds[0]),
        **_judged(torch.cat(probabilities) if judge else None, samples),
        **compare(seen, real),
    }


def _judged(probabilities: Tensor | None, samples: Samples) -> dict[str, Any]:
    labels, seeds, classes = samples.labels, samples.seeds, samples.sampler.num_classes
    if probabilities is None:
        return {"accuracy": None, "accuracy_per_class": None, "lowest": []}
    found = probabilities.argmax(1)
    score = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    lowest = [
        {
            "seed": int(seeds[i]),
            "label": int(labels[i]),
            "judged": int(found[i]),
            "score": float(score[i]),
        }
        for i in score.argsort(stable=True)[:_LOWEST]
    ]
    return {
        "accuracy": float((found == labels).double().mean()),
        "accuracy_per_class": class_accuracy(found, labels, classes),
        "lowest": lowest,
    }


def draw_samples(samples: Samples, sizes: Sequence[Size]) -> dict[Size, Tensor]:
    """Samples at every size: size → images [N, C, H, W]."""
    return {size: torch.cat(list(samples.batches(size))) for size in sizes}
