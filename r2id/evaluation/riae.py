"""Measure an RIAE's reconstructions at the image's own size, other sizes and aspect ratios.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import frechet_distance, mse, ssim
from r2id.evaluation.reference import check_finite
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.models.coords import Size, scale_size
from r2id.progress import Progress

SCALES = {
    "native": (1.0, 1.0),
    "half": (0.5, 0.5),
    "double": (2.0, 2.0),
    "taller": (1.5, 1.0),
    "wider": (1.0, 1.5),
}
"""Factors of height and width, relative to each image's own size."""

_MOST_NATIVE, _MOST_RESIZED = 10_000, 1000  # test images, evenly spaced
_BATCH = 50
_SHOWN = 8  # test images in the figures


@dataclass(frozen=True)
class ReconstructionExamples:
    """A few test images [C, H, W] with their latents and reconstructions, for the figures."""

    originals: list[Tensor]
    rendered: dict[str, list[Tensor]]
    """By the name of a scale: all images decoded at that scale, from latents of their own size."""
    latents: list[Tensor]
    """Raw latents [L, h, w]."""


def measure_riae(
    codec: Codec, shards: ShardSet, data: DataConfig, extractor: FeatureExtractor | None = None
) -> dict[str, dict[str, Any]]:
    """Measure reconstructions of the test split at each of SCALES.

    For each scale it returns the number of images, their most frequent size, and means over images
    of the squared error on [−1, 1], PSNR in dB and SSIM. The truth is the image resized
    bicubically.

    ``mse``, ``psnr`` and ``ssim`` encode the image at its native size and decode it at this size;
    ``mse_encoded`` and so on encode the image resized to this size, on the native latent grid.
    ``frechet`` is the distance of the decoded images to the originals in the extractor's features
    (rFID); None without an extractor.
    """
    total = len(shards.split(data.test_split))
    with Progress(
        "measure RIAE", min(total, _MOST_NATIVE) + min(total, _MOST_RESIZED), unit="images"
    ) as progress:

        def measure(names: list[str], limit: int) -> dict[str, dict[str, Any]]:
            return _measure(codec, shards, data, names, limit, progress, extractor)

        return measure(["native"], _MOST_NATIVE) | measure(
            [name for name in SCALES if name != "native"], _MOST_RESIZED
        )


def _measure(
    codec: Codec,
    shards: ShardSet,
    data: DataConfig,
    names: list[str],
    limit: int,
    progress: Progress,
    extractor: FeatureExtractor | None,
) -> dict[str, dict[str, Any]]:
    # Features of decoded images by scale, and those of the originals under "".
    features: dict[str, list[Tensor]] = defaultdict(list)
    # By (scale, "" or "_encoded"): batches of [B, 2], squared error and SSIM.
    errors: dict[tuple[str, str], list[Tensor]] = defaultdict(list)
    sizes: dict[str, Counter[Size]] = defaultdict(Counter)
    for batch in eval_loader(shards, data, split=data.test_split, batch=_BATCH, limit=limit):
        images = batch["image"].to(codec.device)
        latents, own = codec.encode(images), (images.shape[2], images.shape[3])
        features[""] += [extractor.features(images)] if extractor else []
        for name in names:
            size = scale_size(own, SCALES[name])
            truth = resize(images, size)
            decoded = codec.decode(latents, size, native=own)
            features[name] += [extractor.features(decoded)] if extractor else []
            errors[name, ""].append(_compare(decoded, truth))
            if name != "native":
                from_resized = codec.decode(codec.encode(truth, own), size, native=own)
                errors[name, "_encoded"].append(_compare(from_resized, truth))
            sizes[name][size] += len(images)
        progress.advance(len(images))
    return {
        name: {
            "size": list(sizes[name].most_common(1)[0][0]),
            "images": sizes[name].total(),
            "frechet": frechet_of_batches(features[name], features[""], f"at {name} size"),
            **{
                f"{figure}{kind}": float(value)
                for (scale, kind), parts in errors.items()
                if scale == name
                for figure, value in zip(
                    ("mse", "psnr", "ssim"), _means(torch.cat(parts)), strict=True
                )
            },
        }
        for name in names
    }


def frechet_of_batches(decoded: list[Tensor], originals: list[Tensor], size: str) -> float | None:
    """Return the Fréchet distance of features given in batches; None if there are too few.

    Raises WorkError when some are not finite; ``size`` says for it which ones were decoded.
    """
    if sum(map(len, decoded)) < 2 or sum(map(len, originals)) < 2:
        return None
    one, other = torch.cat(decoded), torch.cat(originals)
    check_finite(other, "test image {}".format)
    check_finite(one, lambda number: f"reconstruction {number} {size}")
    return frechet_distance(one, other)


def _compare(images: Tensor, truth: Tensor) -> Tensor:
    """Return squared error and SSIM of each image: [B, 2]."""
    return torch.stack([mse(images, truth), ssim(images, truth)], 1).cpu()


def _means(errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the means of squared error, PSNR and SSIM."""
    # PSNR is averaged over images, not computed from the mean error.
    return errors[:, 0].mean(), psnr(errors[:, 0]).mean(), errors[:, 1].mean()


def reconstruct_examples(
    codec: Codec, shards: ShardSet, data: DataConfig
) -> ReconstructionExamples:
    """Reconstruct a few test images, evenly spaced, at every scale."""
    originals: list[Tensor] = []
    latents: list[Tensor] = []
    rendered: dict[str, list[Tensor]] = {name: [] for name in SCALES}
    for batch in eval_loader(shards, data, split=data.test_split, batch=_SHOWN, limit=_SHOWN):
        encoded = codec.encode(batch["image"])
        originals += batch["image"]
        latents += encoded.cpu()
        for name, scale in SCALES.items():
            own = (batch["image"].shape[2], batch["image"].shape[3])
            size = scale_size(own, scale)
            rendered[name] += codec.decode(encoded, size, native=own).cpu()
    return ReconstructionExamples(originals, rendered, latents)
