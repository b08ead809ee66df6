"""How well RIAE gives images back: at their own size, at others, and at other aspect ratios.

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
from r2id.evaluation.extractor import Extractor
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import frechet_distance, mse, ssim
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.models.coords import Size
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
_SHOWN = 8


@dataclass(frozen=True)
class RiaePictures:
    """Test images [C, H, W] with what becomes of them."""

    originals: list[Tensor]
    rendered: dict[str, list[Tensor]]
    """Name of a scale → the images, decoded at it from the latents of their own size."""
    latents: list[Tensor]
    """Their raw latents [L, h, w]."""


def scaled(size: Size, scale: tuple[float, float]) -> Size:
    """A size (H, W) times factors, at least 1×1."""
    return max(1, round(size[0] * scale[0])), max(1, round(size[1] * scale[1]))


def measure_riae(
    codec: Codec, shards: ShardSet, data: DataConfig, extractor: Extractor | None = None
) -> dict[str, dict[str, Any]]:
    """For each scale of SCALES, over the test split: number of images, their most frequent size at it, and mean squared
    error on [−1, 1], PSNR in dB and SSIM, all means over images.

    ``mse``, ``psnr`` and ``ssim`` are of latents of the native image, decoded at this size; ``mse_encoded`` and so on of
    latents of the image at this size, on as many cells. Truth is the image resized (bicubic). ``frechet`` is the
    distance of what is decoded to the images as they are, in an extractor's features (rFID), None without one.
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
    extractor: Extractor | None,
) -> dict[str, dict[str, Any]]:
    seen: dict[str, list[Tensor]] = defaultdict(list)
    errors: dict[tuple[str, str], list[Tensor]] = defaultdict(
        list
    )  # [N, 2]: squared error and SSIM
    sizes: dict[str, Counter[Size]] = defaultdict(Counter)
    for batch in eval_loader(shards, data, split=data.test_split, batch=_BATCH, limit=limit):
        images = batch["image"].to(codec.device)
        latents = codec.encode(images)
        seen[""] += [extractor.features(images)] if extractor else []
        for name in names:
            size = scaled((images.shape[2], images.shape[3]), SCALES[name])
            truth = resize(images, size)
            decoded = codec.decode(latents, size)
            seen[name] += [extractor.features(decoded)] if extractor else []
            errors[name, ""].append(_compare(decoded, truth))
            if name != "native":
                again = codec.decode(
                    codec.encode(truth, (latents.shape[2], latents.shape[3])), size
                )
                errors[name, "_encoded"].append(_compare(again, truth))
            sizes[name][size] += len(images)
        progress.advance(len(images))
    return {
        name: {
            "size": list(sizes[name].most_common(1)[0][0]),
            "images": sizes[name].total(),
            "frechet": distance(seen[name], seen[""]),
            **{
                f"{figure}{kind}": float(value)
                for (at, kind), parts in errors.items()
                if at == name
                for figure, value in zip(
                    ("mse", "psnr", "ssim"), _means(torch.cat(parts)), strict=True
                )
            },
        }
        for name in names
    }


def distance(some: list[Tensor], others: list[Tensor]) -> float | None:
    """Fréchet distance of features in batches, None where there are too few."""
    if sum(map(len, some)) < 2 or sum(map(len, others)) < 2:
        return None
    return frechet_distance(torch.cat(some), torch.cat(others))


def _compare(images: Tensor, truth: Tensor) -> Tensor:
    return torch.stack([mse(images, truth), ssim(images, truth)], 1).cpu()


def _means(errors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return errors[:, 0].mean(), psnr(errors[:, 0]).mean(), errors[:, 1].mean()


def draw_riae(codec: Codec, shards: ShardSet, data: DataConfig) -> RiaePictures:
    """A few test images, evenly spaced, reconstructed at every scale."""
    originals: list[Tensor] = []
    latents: list[Tensor] = []
    rendered: dict[str, list[Tensor]] = {name: [] for name in SCALES}
    for batch in eval_loader(shards, data, split=data.test_split, batch=_SHOWN, limit=_SHOWN):
        encoded = codec.encode(batch["image"])
        originals += batch["image"]
        latents += encoded.cpu()
        for name, scale in SCALES.items():
            size = scaled((batch["image"].shape[2], batch["image"].shape[3]), scale)
            rendered[name] += codec.decode(encoded, size).cpu()
    return RiaePictures(originals, rendered, latents)
