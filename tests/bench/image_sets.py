"""The sets of images that autoencoders.py codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from r2id import rng
from r2id.config import DataConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.images import load_images, resize
from r2id.images import to_float, to_uint8
from r2id.models.coords import Size

TESTS, RESIZED = 2000, 400  # test images at the trained size, and at others
HELD_OUT, WINDOW, PHOTO = 10, 64, 1 << 18  # every tenth photo; pixels


@dataclass(frozen=True)
class Setting:
    """One set of images, and how it is cut into cells."""

    shards: str
    config: str
    cell: int
    latents: int
    colours: int = 3
    batch: int | None = None
    """Images per training step of RIAE and the convolutional ones; None: the config's."""
    size: Size | None = None
    """Size of the training images; None: windows of photos."""


SETTINGS = {
    "digits": Setting("digits", "digits/riae.toml", 2, 4, colours=1, size=(8, 8)),
    "mnist": Setting("mnist", "mnist/small-riae.toml", 4, 8, colours=1, size=(28, 28)),
    "photos": Setting("photos", "photos/small-riae.toml", 4, 16, size=(32, 32)),
    "native-8": Setting("photos-native", "photos/native-riae.toml", 8, 16, batch=16),
    "native-4": Setting("photos-native", "photos/native-riae.toml", 4, 16, batch=16),
}


class Images:
    """Images of one size: training images and their classes in memory, and test images."""

    def __init__(self, shards: ShardSet, data: DataConfig) -> None:
        self.flip = data.flip
        self.train, self.labels = load_images(shards, data, data.train_split)
        self.tests = to_float(load_images(shards, data, data.test_split, TESTS)[0])
        self.whole: list[Tensor] = []

    @property
    def size(self) -> Size:
        return self.tests.shape[2], self.tests.shape[3]

    def mirror(self) -> None:
        """Add the mirrored training images to the set, instead of mirroring at random."""
        self.train = torch.cat([self.train, self.train.flip(-1)])
        self.labels, self.flip = self.labels.repeat(2), False

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        """Draw images with replacement; the same for everybody."""
        draws = rng.uniform(rng.fold(0, step, torch.arange(count)), 2)
        chosen = (draws[:, 0] * len(self.train)).long()
        images = to_float(self.train[chosen])
        return _flipped(images, draws[:, 1]) if self.flip else images, chosen

    def numbers(self, step: int, count: int) -> Tensor:
        """Draw the numbers [B] of training images with replacement; the same for everybody."""
        draws = rng.uniform(rng.fold(1, step, torch.arange(count)), 1).squeeze(-1)
        return (draws * len(self.train)).long()

    def some(self) -> Iterator[Tensor]:
        """Training images for a PCA."""
        return iter(to_float(self.train[:: max(1, len(self.train) // 4096)]).split(256))

    def at(self, size: Size) -> tuple[Tensor, Tensor]:
        """Test images at the trained size, and the same at another size."""
        tests = self.tests[:: max(1, len(self.tests) // RESIZED)]
        return tests, resize(tests, size)


class Windows(Images):
    """Windows of photos: random ones to train, those of held-out photos to test."""

    def __init__(self, shards: ShardSet, data: DataConfig) -> None:
        data = data.model_copy(update={"window": None, "size": None, "max_pixels": PHOTO})
        self.flip = data.flip
        photos = [
            to_uint8(batch["image"][0])
            for batch in eval_loader(shards, data, data.train_split, batch=1)
        ]
        seen = [photo for k, photo in enumerate(photos) if k % HELD_OUT]
        self.photos = [photo for photo in seen if min(photo.shape[1:]) >= WINDOW]
        self.whole = [to_float(photo)[None] for photo in photos[::HELD_OUT]]
        self.tests = self._windows(WINDOW, 4)

    def _windows(self, side: int, per_axis: int) -> Tensor:
        """Windows of held-out photos, evenly spaced; of those that are large enough."""
        found = []
        for photo in (photo for photo in self.whole if min(photo.shape[2:]) >= side):
            rows, columns = (
                np.linspace(0, length - side, per_axis).astype(int) for length in photo.shape[2:]
            )
            found += [photo[:, :, y : y + side, x : x + side] for y in rows for x in columns]
        return torch.cat(found)

    def batch(self, step: int, count: int) -> tuple[Tensor, Tensor]:
        draws = rng.uniform(rng.fold(0, step, torch.arange(count)), 4)
        chosen = (draws[:, 0] * len(self.photos)).long()
        windows = []
        for number, (_, down, right, _) in zip(chosen.tolist(), draws.tolist(), strict=True):
            photo = self.photos[number]
            y, x = (
                int(place * (length - WINDOW + 1))
                for place, length in zip((down, right), photo.shape[1:], strict=True)
            )
            windows.append(photo[:, y : y + WINDOW, x : x + WINDOW])
        images = to_float(torch.stack(windows))
        return _flipped(images, draws[:, 3]) if self.flip else images, chosen

    def some(self) -> Iterator[Tensor]:
        return (self.batch((1 << 31) + number, 256)[0] for number in range(16))

    @cached_property
    def _finer(self) -> Tensor:
        finer = self._windows(2 * WINDOW, 4)
        return finer[:: max(1, len(finer) // RESIZED)]

    def at(self, size: Size) -> tuple[Tensor, Tensor]:
        """Windows of twice the side, shrunk to the trained size, and to the other."""
        return resize(self._finer, (WINDOW, WINDOW)), resize(self._finer, size)


def _flipped(images: Tensor, draws: Tensor) -> Tensor:
    return torch.where((draws < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
