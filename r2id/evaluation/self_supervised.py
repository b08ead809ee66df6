"""Train a feature extractor on the images of a shard set that has no classes.

Two views of an image, cropped, lit and mirrored differently, must have the same features, while the
features of different images vary and their dimensions do not repeat each other: VICReg (Bardes,
Ponce & LeCun 2022). The network is that of the classifier (r2id.evaluation.backbone).

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.backbone import (
    BATCH,
    Backbone,
    autocast,
    batches,
    may_be_mirrored,
    mirror,
    optimizer_and_schedule,
)
from r2id.evaluation.images import frequent_size, load_images, resize
from r2id.evaluation.saved import hash_of, identity_of, read_network, write_network
from r2id.images import to_float
from r2id.models.coords import Size
from r2id.progress import Progress, say

# Version of the training recipe below and in r2id.evaluation.backbone: raise it when a recipe
# changes, so that saved extractors are trained again.
_VERSION = 1
_MOST_IMAGES = 50_000  # of the split, evenly spaced: they are held in memory
_SEEN = 300 * BATCH  # images in training, of all epochs, each in two views
_EXPANDED = 512  # dimensions in which views are compared
_COVARIANCE = 0.04  # weight, where those of invariance and variance are 1
_SMALLEST_CROP = 0.55  # part of the sides
_BRIGHTNESS, _CONTRAST, _COLOUR = 0.3, 0.3, 0.15
_SEED = 0


@dataclass(frozen=True)
class SelfSupervisedExtractor:
    """A trained extractor, which is an r2id.evaluation.extractor.FeatureExtractor."""

    model: Backbone
    size: Size
    """Height and width of its input; other images are resized to it."""
    train_images: int
    name: str = "self-supervised"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        return hash_of(self.model)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Extract features of images in [−1, 1]: [N, C, H, W] → float32 [N, D] on the CPU."""
        device = self.model.whitening.weight.device
        with autocast(device):
            return self.model(resize(images, self.size).to(device)).cpu()


def load_or_train_extractor(
    shards: ShardSet, data: DataConfig, file: Path, device: torch.device
) -> SelfSupervisedExtractor:
    """Return the extractor of a shard set, whose labels it does not use.

    It is read from ``file`` if that holds one trained on the same data by the same recipe.
    Otherwise it is trained and saved there. Raises InputError when the split has one image.
    """
    size = frequent_size(shards.split(data.train_split))
    identity = identity_of(
        "self-supervised", _VERSION, shards.digest, size, data.channels, data.train_split
    )
    found = read_network(file, identity, lambda: Backbone(data.channels, size))
    if found:
        say(f"{file}: feature extractor found in place")
        extractor = SelfSupervisedExtractor(found[0], size, **found[1])
    else:
        data = data.model_copy(update={"size": size, "latents": None})
        images, _ = load_images(shards, data, data.train_split, _MOST_IMAGES)
        if len(images) < 2:
            raise InputError(
                f"{shards.folder}: a feature extractor takes two images in split "
                f"{data.train_split!r}, which has {len(images)}"
            )
        extractor = SelfSupervisedExtractor(
            train_backbone(images, device, _SEEN), size, len(images)
        )
        write_network(file, identity, extractor.model, {"train_images": len(images)})
    extractor.model.to(device)
    return extractor


def train_backbone(images: Tensor, device: torch.device, seen: int) -> Backbone:
    """Train a backbone on uint8 images [N, C, H, W], ``seen`` of them in all epochs.

    The same input gives the same weights. The global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        backbone = Backbone(images.shape[1], (images.shape[2], images.shape[3]))
        expander = nn.Sequential(
            nn.Linear(Backbone.width, _EXPANDED, bias=False),
            nn.BatchNorm1d(_EXPANDED),
            nn.ReLU(),
            nn.Linear(_EXPANDED, _EXPANDED, bias=False),
        )
    backbone.whiten(images)
    model = nn.Sequential(backbone, expander).to(device)
    generator = torch.Generator().manual_seed(_SEED)
    mirrored = may_be_mirrored(images, torch.zeros(len(images)))
    optimizer, schedule = optimizer_and_schedule(model, seen // BATCH)
    with Progress("train extractor", seen // BATCH, unit="images", per_item=BATCH) as progress:
        for chosen, _ in batches(len(images), seen, generator):
            inputs = to_float(images[chosen])
            views = [view(inputs, generator, mirrored) for _ in range(2)]
            with autocast(device):
                expanded = model(torch.cat(views).to(device))
            loss = vicreg_loss(*expanded.float().chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    return backbone.eval().requires_grad_(False)


def view(images: Tensor, generator: torch.Generator, mirrored: bool) -> Tensor:
    """Crop, enlarge and light images [N, C, H, W], each by its own draw; mirror half if allowed."""
    count, channels = images.shape[:2]
    draw = torch.rand(5 + channels, count, generator=generator)
    part = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * draw[0]
    right, down = (2 * draw[1:3] - 1) * (1 - part)
    zero = torch.zeros(count)
    matrix = torch.stack(
        [torch.stack([part, zero, right], 1), torch.stack([zero, part, down], 1)], 1
    )
    coords = F.affine_grid(matrix, list(images.shape), align_corners=False)
    cropped = F.grid_sample(images, coords, padding_mode="border", align_corners=False)
    contrast, brightness, *gain = 2 * draw[3:] - 1
    colour = torch.stack(gain, 1)[:, :, None, None] if channels > 1 else 0
    lit = cropped * (1 + _CONTRAST * contrast[:, None, None, None] + _COLOUR * colour)
    lit = (lit + _BRIGHTNESS * brightness[:, None, None, None]).clamp(-1, 1)
    return mirror(lit, torch.rand(count, generator=generator) < 0.5) if mirrored else lit


def vicreg_loss(one: Tensor, other: Tensor) -> Tensor:
    """Return the loss of two views' vectors [N, D]: that of the authors' code, divided by 25.

    It adds up the squared difference of the views, what the standard deviation of a dimension lacks
    of 1, and the squared covariances between dimensions.
    """
    loss = F.mse_loss(one, other)
    for vectors in (one, other):
        centred = vectors - vectors.mean(0)
        spread = (centred.square().sum(0) / (len(vectors) - 1) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(vectors) - 1)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + F.relu(1 - spread).mean() / 2 + _COVARIANCE * off / vectors.shape[1]
    return loss
