"""Measure an R2ID: its loss by time and by latent grid, and the quality of its samples.

Samples are scored by a classifier of real images (r2id.evaluation.classifier) and compared with
real images in the features of an extractor.

Shape letters: N samples · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.diffusion import schedule
from r2id.evaluation.classifier import Classifier
from r2id.evaluation.errors_by_noise import loss_at
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import class_accuracy
from r2id.evaluation.reference import (
    BATCH,
    MOST_REAL,
    ImageFeatures,
    compare_features,
    extract_features,
    frechet_spread,
    real_batches,
    window_part,
)
from r2id.models.conditioning import empty
from r2id.models.coords import Size, scale_size
from r2id.progress import Progress
from r2id.sampling.conditions import spread_labels
from r2id.sampling.sampler import Sampler

TIMES = tuple(round(0.05 + 0.1 * k, 2) for k in range(10))
"""Diffusion times at which the loss is measured, from nearly data to nearly noise."""

_LOSS_IMAGES = 256  # test images, evenly spaced
_LOWEST = 20  # samples with the lowest scores that are listed

Latents = Sequence[tuple[Tensor, Tensor]]
"""Batches of raw latents [N, L, h, w] and conditions [N, …]."""


def encode_test_images(sampler: Sampler, shards: ShardSet, data: DataConfig) -> Latents:
    """Encode some test images; return latents and conditions on the codec's device."""
    batches = eval_loader(shards, data, split=data.test_split, batch=BATCH, limit=_LOSS_IMAGES)
    return [(sampler.codec.encode(b["image"]), _condition(sampler, b)) for b in batches]


def encode_resized(
    sampler: Sampler, shards: ShardSet, data: DataConfig, size: Size, limit: int
) -> Latents:
    """Resize ``limit`` test images and encode them at that size.

    Returns latents and conditions on the codec's device.
    """
    data = data.model_copy(update={"size": sampler.codec.image, "latents": None})
    batches = eval_loader(shards, data, split=data.test_split, batch=BATCH, limit=limit)
    return [
        (sampler.codec.encode(resize(b["image"], size)), _condition(sampler, b)) for b in batches
    ]


def _condition(sampler: Sampler, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the condition of a batch: what the model is told of images, or else their classes."""
    kind = sampler.model.config.condition
    return batch[kind if kind in batch else "label"].to(sampler.codec.device)


def _changes(sampler: Sampler, condition: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return conditions that the loss is measured with, made of an image's own: first that one."""
    if condition.dim() == 1:
        classes = sampler.num_classes
        if classes < 2:
            return {"no class": empty}
        return {
            "its class": lambda own: own,
            "no class": empty,
            "another class": lambda own: (own + 1) % classes,
        }
    kind = sampler.model.config.condition
    return {
        f"its {kind}": lambda own: own,
        f"no {kind}": empty,
        f"another image's {kind}": lambda own: own.roll(1, 0),
    }


def measure_loss_by_time(
    sampler: Sampler,
    latents: Latents,
    times: Sequence[float] = TIMES,
    seed: int = 0,
    own_alone: bool = False,
    title: str = "loss by time",
) -> dict[str, Any]:
    """Measure the mean loss of test latents at each time, given their class, none, or a wrong one.

    The same with attributes or embeddings for models of these. All conditions share the same noise,
    so their curves differ by the condition alone: it matters where the curves part. A model without
    conditions is measured without. ``own_alone`` leaves out all but an image's own, and ``title``
    is that of the progress.
    """
    changes = _changes(sampler, latents[0][1])
    if own_alone:
        changes = dict(list(changes.items())[:1])
    images = sum(len(condition) for _, condition in latents)
    losses: dict[str, list[float]] = {}
    with Progress(title, len(changes) * len(times) * images, unit="images") as progress:
        for name, change in changes.items():
            losses[name] = []
            for time in times:
                total = sum(
                    float(loss_at(sampler, latent, change(own), time, seed + number).sum())
                    for number, (latent, own) in enumerate(latents)
                )
                losses[name].append(total / images)
                progress.advance(images)
    return {"images": images, "time": list(times), "loss": losses}


def measure_loss_by_grid(
    sampler: Sampler,
    shards: ShardSet,
    data: DataConfig,
    times: Sequence[float] = TIMES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure the mean loss against logSNR on three latent grids, given the own condition.

    The grids are those of the images at half, at their own and at double size. Where the curves
    coincide, denoising is equally hard on every grid at the same logSNR.
    """
    curves = {}
    for factor in (0.5, 1.0, 2.0):
        size = scale_size(sampler.codec.image, (factor, factor))
        grid = sampler.codec.grid_for(size)
        name = f"{grid[0]}x{grid[1]}"
        if name in curves:
            continue
        measured = measure_loss_by_time(
            sampler,
            encode_resized(sampler, shards, data, size, _LOSS_IMAGES),
            times,
            seed,
            own_alone=True,
            title=f"loss on {name}",
        )
        curves[name] = {
            "images": measured["images"],
            "size": list(size),
            "loss": next(iter(measured["loss"].values())),
            "log_snr": schedule.log_snr(
                torch.tensor(times), sampler.diffusion.schedule, sampler.shift(grid)
            ).tolist(),
        }
    return {"time": list(times), "condition": next(iter(measured["loss"])), "grids": curves}


def measure_real_baseline(
    extractor: FeatureExtractor, shards: ShardSet, data: DataConfig, size: Size, count: int
) -> tuple[ImageFeatures, dict[str, Any]]:
    """Extract features of real test images, and measure what perfect samples would score.

    The baseline compares ``count`` real training images (all, if there are fewer) with the test
    images. Samples cannot be expected to come closer.
    """

    window = window_part(size, extractor.size)

    def read(split: str, limit: int) -> ImageFeatures:
        batches = real_batches(shards, data, split, size, limit)
        return extract_features(extractor, (images for images, _ in batches), window)

    real, training = read(data.test_split, MOST_REAL), read(data.train_split, count)
    return real, {
        "test_images": len(real),
        "training_images": len(training),
        **{
            f"{name}_of_training_images": value
            for name, value in compare_features(training, real).items()
        },
    }


class Samples:
    """``count`` samples of all classes in turn, with seeds from ``seed`` on, at any size.

    Fewer samples than there are classes are of evenly spaced ones (spread_labels). Samples of a
    model of attributes or embeddings are drawn under ``given`` [M, …] in turn; without, under none.

    Latents are sampled once per latent grid, and decoded at every image size that uses the grid.
    """

    def __init__(
        self, sampler: Sampler, count: int, seed: int, given: Tensor | None = None
    ) -> None:
        self.sampler, self.given = sampler, given
        self.labels, self.seeds = (
            spread_labels(count, sampler.num_classes),
            torch.arange(seed, seed + count),
        )
        # By grid: latents of the first seeds, as many as were needed so far.
        self._latents: dict[Size, Tensor] = {}

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def conditions(self) -> Tensor:
        """What each sample is drawn under: given conditions [N, …], or classes [N]."""
        if self.given is None:
            return self.labels
        return self.given[torch.arange(len(self)) % len(self.given)]

    @property
    def condition(self) -> str:
        """What samples are drawn under: "class", "attributes", "embedding", or "none" of these."""
        if self.given is not None:
            return self.sampler.model.config.condition
        return "class" if self.sampler.num_classes else "none"

    def drawn_by(self, sampler: Sampler) -> Samples:
        """Return the same samples, drawn by another sampler."""
        return Samples(sampler, len(self), int(self.seeds[0]), self.given)

    def first(self, count: int) -> Samples:
        """Return ``count`` samples that share seeds, labels and computed latents with these."""
        samples = Samples(self.sampler, count, int(self.seeds[0]), self.given)
        period = min(len(self), max(1, self.sampler.num_classes))
        samples.labels = self.labels[torch.arange(count) % period]
        samples._latents = self._latents
        return samples

    def with_count(self, count: int) -> Samples:
        """Return ``count`` samples with these seeds, whose classes stand for all.

        They share latents with these unless there are more classes than samples, so that the first
        of these samples are of the first classes alone.
        """
        samples = self.first(count)
        labels = spread_labels(count, self.sampler.num_classes)
        return (
            samples
            if samples.labels.equal(labels)
            else Samples(self.sampler, count, int(self.seeds[0]), self.given)
        )

    def batches(self, size: Size, length: int | None = None) -> Iterator[Tensor]:
        """Yield images [N, C, H, W] of a size, ``length`` at a time (default: as memory allows)."""
        latents = self._sampled(self.sampler.grid_for(size))
        with Progress(f"render {size[0]}x{size[1]}", len(self), unit="images") as progress:
            for part in latents.split(length or self.sampler.batch_length(size)):
                yield self.sampler.render(part, size)
                progress.advance(len(part))

    def _sampled(self, grid: Size) -> Tensor:
        """Return the latents on a grid, sampling those that were not needed before."""
        parts = [self._latents[grid]] if grid in self._latents else []
        done = sum(map(len, parts))
        if done < len(self):
            with Progress(
                f"sample {grid[0]}x{grid[1]} latents", len(self) - done, unit="samples"
            ) as progress:
                for conditions, seeds in zip(
                    self.conditions[done:].split(BATCH), self.seeds[done:].split(BATCH), strict=True
                ):
                    parts.append(self.sampler.latents(conditions, seeds, grid))
                    progress.advance(len(seeds))
            self._latents[grid] = torch.cat(parts)
        return self._latents[grid][: len(self)]


def score_samples(
    samples: Samples,
    classifier: Classifier | None,
    extractor: FeatureExtractor,
    real: ImageFeatures,
    size: Size,
    spread: bool = False,
) -> dict[str, Any]:
    """Score samples of one size.

    Returns the class accuracy (the share classified as the class asked for), the same per class,
    the samples with the lowest probability of that class, and the metrics of compare_features.
    Values are None without a classifier, or where there are too few images for a metric. With
    ``spread``, the result of frechet_spread is among them.

    Raises WorkError when features of a sample are not finite.
    """
    probabilities: list[Tensor] = []

    def classified() -> Iterator[Tensor]:
        for images in samples.batches(size):
            if classifier:
                probabilities.append(classifier.probabilities(images))
            yield images

    sampler = samples.sampler
    window = window_part(sampler.codec.image, extractor.size)

    def name(number: int) -> str:
        guidance = sampler.defaults.guidance
        seed = int(samples.seeds[number])
        return f"sample of seed {seed} at {size[0]}x{size[1]}, guidance {guidance:g}"

    features = extract_features(extractor, classified(), window, name)
    return {
        "size": list(size),
        "grid": list(sampler.grid_for(size)),
        "samples": len(samples),
        "first_seed": int(samples.seeds[0]),
        "classes": len(samples.labels.unique()) if sampler.num_classes else 0,
        **_class_scores(torch.cat(probabilities) if classifier else None, samples),
        **compare_features(features, real),
        **({"frechet_spread": frechet_spread(features, real)} if spread else {}),
    }


def _class_scores(probabilities: Tensor | None, samples: Samples) -> dict[str, Any]:
    """Compare the classifier's probabilities [N, classes] with the classes asked for."""
    labels, seeds, classes = samples.labels, samples.seeds, samples.sampler.num_classes
    if probabilities is None:
        return {"accuracy": None, "accuracy_per_class": None, "lowest": []}
    predicted = probabilities.argmax(1)
    score = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
    lowest = [
        {
            "seed": int(seeds[i]),
            "label": int(labels[i]),
            "predicted": int(predicted[i]),
            "score": float(score[i]),
        }
        for i in score.argsort(stable=True)[:_LOWEST]
    ]
    return {
        "accuracy": float((predicted == labels).double().mean()),
        "accuracy_per_class": class_accuracy(predicted, labels, classes),
        "lowest": lowest,
    }


def draw_samples(samples: Samples, sizes: Sequence[Size]) -> dict[Size, Tensor]:
    """Decode samples at every size: size → images [N, C, H, W]."""
    return {size: torch.cat(list(samples.batches(size))) for size in sizes}
