"""Measure resolution invariance: samples and reconstructions at many sizes and aspect ratios.

Every metric of samples is reported beside the same metric of real test images that are resized
("stretched") to the same size. Shrinking alone costs detail, so a model cannot be expected to do
better than real images. r2id.evaluation.images.resize brings pictures of every size to the feature
extractor's input, and thereby stretches other aspect ratios back.

Shape letters: N images · C colours · H, W image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.classifier import Classifier
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import mse, ssim
from r2id.evaluation.r2id import Samples, score_samples
from r2id.evaluation.reference import (
    MOST_REAL,
    ImageFeatures,
    compare_features,
    extract_features,
    real_batches,
    window_part,
)
from r2id.evaluation.riae import frechet_of_batches
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.models.coords import Size, scale_size
from r2id.progress import Progress

_SIDE = 28  # the sizes below are for MNIST; other data is measured at the same ratios to its size
_SIZES = (
    (10, 10),
    (14, 14),
    (16, 16),
    (28, 28),
    (32, 32),
    (40, 24),
    (24, 40),
    (18, 32),
    (32, 18),
    (27, 18),
    (18, 27),
    (56, 56),
    (64, 64),
    (128, 128),
)
SIZE_RULE = (
    "10, 14, 16, 28, 32, 56, 64 and 128 squared, 40×24, 24×40, 18×32, 32×18, 27×18 and 18×27 "
    "pixels where the native size is 28×28, and the same shares of height and width where it is "
    "another; none of more than 2²⁰ pixels"
)

_MOST_PIXELS = 1 << 20
_PAIRED = 100  # samples that are also drawn at twice the size, to measure consistency
_RECONSTRUCTED = 100  # test images, evenly spaced
_RECONSTRUCTED_BATCH, _STRETCHED_BATCH = 20, 16

Row = dict[str, Any]


def invariance_sizes(native: Size) -> list[Size]:
    """Return the distinct sizes to measure at for images of a native size; see SIZE_RULE."""
    sizes = dict.fromkeys(
        scale_size(native, (height / _SIDE, width / _SIDE)) for height, width in _SIZES
    )
    return [size for size in sizes if size[0] * size[1] <= _MOST_PIXELS or size == native]


def halve(images: Tensor) -> Tensor:
    """Average 2×2 pixels: [N, C, 2H, 2W] → [N, C, H, W]."""
    return F.avg_pool2d(images, 2)


def measure_samples(
    samples: Samples,
    classifier: Classifier | None,
    extractor: FeatureExtractor,
    shards: ShardSet,
    data: DataConfig,
) -> dict[str, Any]:
    """Score samples and stretched real images at every size, and the consistency of the samples.

    Both are compared with one half of the test split (every other image); the stretched images come
    from the other half. At the native size, their scores therefore compare two halves of the real
    data, which is the best that samples can reach. Both are as many, because distances grow where
    images are fewer: if that half has fewer images than there are samples, fewer samples are
    scored. The test split must have at least 2 images.
    """
    native = samples.sampler.codec.image
    indices = np.arange(len(shards.split(data.test_split)))
    samples = samples.with_count(min(len(samples), len(indices[1::2])))

    def read(half: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        return real_batches(shards, data, data.test_split, native, limit, indices[half::2])

    window = window_part(native, extractor.size)
    real = extract_features(extractor, (images for images, _ in read(0, MOST_REAL)), window)
    rows: dict[str, Row] = {}
    pairs = samples.first(min(len(samples), _PAIRED))
    for size in invariance_sizes(native):
        scores = score_samples(samples, classifier, extractor, real, size)
        del scores["lowest"]  # of one size alone, for which they are drawn
        rows[f"{size[0]}x{size[1]}"] = {
            **scores,
            "stretched": score_stretched(
                classifier, extractor, real, read(1, len(samples)), size, window
            ),
            "consistency": score_consistency(pairs, classifier, size),
        }
    return {"reference_images": len(real), "sizes": rows}


def score_stretched(
    classifier: Classifier | None,
    extractor: FeatureExtractor,
    real: ImageFeatures,
    batches: Iterator[tuple[Tensor, Tensor]],
    size: Size,
    window: tuple[float, float] = (0.5, 0.5),
) -> Row:
    """Score real images resized to another size: class accuracy, and distances to ``real``.

    ``window`` is the part of the sides that windows have.
    """
    correct: list[Tensor] = []

    def stretch() -> Iterator[Tensor]:
        for images, labels in batches:
            for part, truth in zip(
                images.split(_STRETCHED_BATCH), labels.split(_STRETCHED_BATCH), strict=True
            ):
                stretched = resize(part, size)
                if classifier:
                    predicted = classifier.classify(stretched)
                    correct.append((predicted == truth)[truth >= 0])
                yield stretched

    features = extract_features(extractor, stretch(), window)
    hits = torch.cat(correct) if correct else torch.zeros(0)
    return {
        "images": len(features),
        "accuracy": float(hits.double().mean()) if len(hits) else None,
        **compare_features(features, real),
    }


def score_consistency(samples: Samples, classifier: Classifier | None, size: Size) -> Row:
    """Compare samples of the same seeds at a size and at twice the size.

    Returns the mean PSNR in dB of the larger images, averaged down 2×2, against the smaller ones,
    and the share of seeds that the classifier assigns the same class at both sizes.
    """
    twice = 2 * size[0], 2 * size[1]
    length, errors, same = samples.sampler.batch_length(twice), [], []
    for small, large in zip(
        samples.batches(size, length), samples.batches(twice, length), strict=True
    ):
        errors.append(mse(halve(large), small))
        if classifier:
            same.append(classifier.classify(small) == classifier.classify(large))
    return {
        "samples": len(samples),
        "first_seed": int(samples.seeds[0]),
        "psnr": float(psnr(torch.cat(errors)).mean()),
        "same_class": float(torch.cat(same).double().mean()) if same else None,
    }


def measure_reconstructions(
    codec: Codec,
    shards: ShardSet,
    data: DataConfig,
    extractor: FeatureExtractor | None = None,
    limit: int = _RECONSTRUCTED,
) -> dict[str, Any]:
    """Encode test images at their own size and decode them at each size of SIZE_RULE.

    The truth is the image resized bicubically. For each size it returns the means over images of
    squared error, PSNR, SSIM and consistency: the PSNR of the image decoded at twice the size,
    averaged down 2×2, against the one decoded at the size. All are on [−1, 1]. With an extractor it
    also returns the Fréchet distance to the originals. "half_to_double" is the error of encoding at
    half and decoding at double the own size.
    """
    native = codec.image
    sizes = invariance_sizes(native)
    figures: dict[tuple[Size, str], list[Tensor]] = {}
    originals: list[Tensor] = []
    halved: list[Tensor] = []
    total = min(limit, len(shards.split(data.test_split)))
    with Progress("reconstruct at many sizes", total, unit="images") as progress:
        for batch in eval_loader(
            shards, data, split=data.test_split, batch=_RECONSTRUCTED_BATCH, limit=limit
        ):
            images = batch["image"]
            latents = codec.encode(images)
            own: Size = (images.shape[2], images.shape[3])
            for size in sizes:
                target = scale_size(own, (size[0] / native[0], size[1] / native[1]))
                for name, values in _reconstruct(codec, images, latents, target, extractor).items():
                    figures.setdefault((size, name), []).append(values)
            originals += [extractor.features(images)] if extractor else []
            halved.append(_half_to_double(codec, images, latents))
            progress.advance(len(images))
    rows = {f"{size[0]}x{size[1]}": _row(size, figures, originals) for size in sizes}
    enlarged, same_size = torch.cat(halved).double().mean(0).tolist()
    return {
        "sizes": rows,
        "half_to_double": {
            "images": total,
            "mse": enlarged,
            "native_mse": same_size,
            "relative": enlarged / same_size,
        },
    }


def _reconstruct(
    codec: Codec, images: Tensor, latents: Tensor, size: Size, extractor: FeatureExtractor | None
) -> dict[str, Tensor]:
    """Decode latents at a size; return figures [N] by name, and features with an extractor."""
    own: Size = (images.shape[2], images.shape[3])
    truth, decoded = resize(images, size), codec.decode(latents, size, native=own).cpu()
    larger = codec.decode(latents, (2 * size[0], 2 * size[1]), native=own).cpu()
    values = {
        "mse": mse(decoded, truth),
        "ssim": ssim(decoded, truth),
        "consistency": psnr(mse(halve(larger), decoded)),
    }
    return values | ({"features": extractor.features(decoded)} if extractor else {})


def _row(size: Size, figures: dict[tuple[Size, str], list[Tensor]], originals: list[Tensor]) -> Row:
    def mean(name: str) -> Tensor:
        return torch.cat(figures[size, name]).mean()

    error = torch.cat(figures[size, "mse"])
    return {
        "size": list(size),
        "images": len(error),
        "mse": float(error.mean()),
        "psnr": float(psnr(error).mean()),
        "ssim": float(mean("ssim")),
        "consistency": float(mean("consistency")),
        "frechet": frechet_of_batches(
            figures.get((size, "features"), []), originals, f"at {size[0]}x{size[1]}"
        ),
    }


def _half_to_double(codec: Codec, images: Tensor, latents: Tensor) -> Tensor:
    """Return squared errors [N, 2]: half size in, double size out; and own size in and out.

    The half-size image is encoded on the latent grid of the own size, so that both have the same
    number of cells.
    """
    own: Size = (images.shape[2], images.shape[3])
    half, double = (scale_size(own, (factor, factor)) for factor in (0.5, 2.0))
    enlarged = codec.decode(codec.encode(resize(images, half), own), double, native=own).cpu()
    return torch.stack(
        [mse(enlarged, resize(images, double)), mse(codec.decode(latents, own).cpu(), images)], 1
    )
