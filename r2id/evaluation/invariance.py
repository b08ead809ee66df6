"""How little the resolution matters: samples and reconstructions at many sizes and aspect ratios.

Each figure of samples stands next to what the same judge says of real images stretched to that size. One rule for all:
every picture, of whatever size and aspect ratio, is brought to the judge's size by r2id.evaluation.images.resize, so that
what a model draws at another aspect ratio is stretched back.

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
from r2id.evaluation.classifier import Judge
from r2id.evaluation.extractor import Extractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import mse, ssim
from r2id.evaluation.r2id import Samples, score_samples
from r2id.evaluation.reference import MOST_REAL, Seen, compare, real_batches, see
from r2id.evaluation.riae import distance, scaled
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.progress import Progress

_SIDE = 28  # the sizes below are of MNIST
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
    "10, 14, 16, 28, 32, 56, 64 and 128 squared, 40×24, 24×40, 18×32, 32×18, 27×18 and 18×27 pixels where the "
    "native size is 28×28, and the same shares of height and width where it is another; none of more than 2²⁰ pixels"
)

_MOST_PIXELS = 1 << 20
_PAIRED = 100  # samples that are drawn at twice the size too
_RECONSTRUCTED = 100  # test images, evenly spaced
_FEW = 20  # of them at once
_STRETCHED = 16  # real images that are stretched at once

Row = dict[str, Any]


def invariance_sizes(native: Size) -> list[Size]:
    """The sizes for images of a native size, see SIZE_RULE; each once."""
    sizes = dict.fromkeys(
        scaled(native, (height / _SIDE, width / _SIDE)) for height, width in _SIZES
    )
    return [size for size in sizes if size[0] * size[1] <= _MOST_PIXELS or size == native]


def halve(images: Tensor) -> Tensor:
    """Means of 2×2 pixels: [N, C, 2H, 2W] → [N, C, H, W]."""
    return F.avg_pool2d(images, 2)


def measure_samples(
    samples: Samples, judge: Judge | None, extractor: Extractor, shards: ShardSet, data: DataConfig
) -> dict[str, Any]:
    """For each size: the samples, as many real test images stretched to it, and one seed at it and at twice of it.

    The real images that both are compared with are every other one of the test split, those that are stretched are of the
    rest, so that the native size's row tells what two halves of the real data are from each other.
    """
    native = samples.sampler.codec.image
    indices = np.arange(len(shards.split(data.test_split)))

    def read(half: int, limit: int) -> Iterator[tuple[Tensor, Tensor]]:
        return real_batches(shards, data, data.test_split, native, limit, indices[half::2])

    real = see(extractor, (images for images, _ in read(0, MOST_REAL)))
    rows: dict[str, Row] = {}
    pairs = samples.first(min(len(samples), _PAIRED))
    for size in invariance_sizes(native):
        rows[f"{size[0]}x{size[1]}"] = {
            **score_samples(samples, judge, extractor, real, size),
            "stretched": score_stretched(judge, extractor, real, read(1, len(samples)), size),
            "consistency": pair_samples(pairs, judge, size),
        }
    return {"reference_images": len(real), "sizes": rows}


def score_stretched(
    judge: Judge | None,
    extractor: Extractor,
    real: Seen,
    batches: Iterator[tuple[Tensor, Tensor]],
    size: Size,
) -> Row:
    """What judge and extractor make of real images that went through another size: accuracy and compare's figures."""
    right: list[Tensor] = []

    def stretch() -> Iterator[Tensor]:
        for images, labels in batches:
            for some, known in zip(images.split(_STRETCHED), labels.split(_STRETCHED), strict=True):
                stretched = resize(some, size)
                if judge:
                    right.append(judge.look(stretched)[1][known >= 0] == known[known >= 0])
                yield stretched

    seen = see(extractor, stretch())
    answers = torch.cat(right) if right else torch.zeros(0)
    return {
        "images": len(seen),
        "accuracy": float(answers.double().mean()) if len(answers) else None,
        **compare(seen, real),
    }


def pair_samples(samples: Samples, judge: Judge | None, size: Size) -> Row:
    """The same seeds at a size and at twice of it: PSNR in dB of the larger, averaged down, against the smaller (mean over
    seeds), and the share that is judged to be of the same class at both."""
    twice = 2 * size[0], 2 * size[1]
    length, errors, same = samples.sampler.batch_length(twice), [], []
    for small, large in zip(
        samples.batches(size, length), samples.batches(twice, length), strict=True
    ):
        errors.append(mse(halve(large), small))
        if judge:
            same.append(judge.look(small)[1] == judge.look(large)[1])
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
    extractor: Extractor | None = None,
    limit: int = _RECONSTRUCTED,
) -> dict[str, Any]:
    """Test images encoded at their own size and decoded at each size of the rule, against the bicubic truth.

    Means over images of PSNR, SSIM and consistency (PSNR of twice the size averaged down against the size), all on
    [−1, 1], the Fréchet distance to the originals in an extractor's features where there is one, and the error of encoding
    at half and decoding at double.
    """
    native = codec.image
    sizes = invariance_sizes(native)
    figures: dict[tuple[Size, str], list[Tensor]] = {}
    originals: list[Tensor] = []
    halved: list[Tensor] = []
    total = min(limit, len(shards.split(data.test_split)))
    with Progress("reconstruct at many sizes", total, unit="images") as progress:
        for batch in eval_loader(shards, data, split=data.test_split, batch=_FEW, limit=limit):
            images = batch["image"]
            latents = codec.encode(images)
            own: Size = (images.shape[2], images.shape[3])
            for size in sizes:
                at = scaled(own, (size[0] / native[0], size[1] / native[1]))
                for name, values in _reconstruct(codec, images, latents, at, extractor).items():
                    figures.setdefault((size, name), []).append(values)
            originals += [extractor.features(images)] if extractor else []
            halved.append(_half_to_double(codec, images, latents))
            progress.advance(len(images))
    rows = {f"{size[0]}x{size[1]}": _row(size, figures, originals) for size in sizes}
    wide, plain = torch.cat(halved).double().mean(0).tolist()
    return {
        "sizes": rows,
        "half_to_double": {
            "images": total,
            "mse": wide,
            "native_mse": plain,
            "relative": wide / plain,
        },
    }


def _reconstruct(
    codec: Codec, images: Tensor, latents: Tensor, size: Size, extractor: Extractor | None
) -> dict[str, Tensor]:
    truth, decoded = resize(images, size), codec.decode(latents, size).cpu()
    larger = codec.decode(latents, (2 * size[0], 2 * size[1])).cpu()
    found = {
        "mse": mse(decoded, truth),
        "ssim": ssim(decoded, truth),
        "consistency": psnr(mse(halve(larger), decoded)),
    }
    return found | ({"features": extractor.features(decoded)} if extractor else {})


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
        "frechet": distance(figures.get((size, "features"), []), originals),
    }


def _half_to_double(codec: Codec, images: Tensor, latents: Tensor) -> Tensor:
    """Squared errors [N, 2]: encoded at half size on as many cells and decoded at double, and both at the native size."""
    own: Size = (images.shape[2], images.shape[3])
    half, double = (scaled(own, (factor, factor)) for factor in (0.5, 2.0))
    wide = codec.decode(
        codec.encode(resize(images, half), (latents.shape[2], latents.shape[3])), double
    ).cpu()
    return torch.stack(
        [mse(wide, resize(images, double)), mse(codec.decode(latents, own).cpu(), images)], 1
    )
