"""Train a small convolutional classifier on real images of the evaluated shard set.

It measures the class accuracy of samples. It is also the default feature extractor for Fréchet
distances, precision and recall (r2id.evaluation.extractor). Its own accuracy on real test images is
reported beside every figure that depends on it.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    FEWEST_IMAGES,
    MOST_IMAGES,
    Backbone,
    autocast,
    batches,
    distort,
    may_be_mirrored,
    mirror,
    moved_diagonally,
    optimizer_and_schedule,
    shift,
)
from r2id.evaluation.images import frequent_size, load_images, resize
from r2id.evaluation.saved import hash_of, identity_of, read_network, write_network
from r2id.images import to_float
from r2id.models.coords import Size
from r2id.progress import Progress, say

# Version of the training recipe below and in r2id.evaluation.backbone: raise it when a recipe
# changes, so that saved classifiers are trained again.
_VERSION = 4
_MOST_IMAGES = 200_000  # of a split, evenly spaced: they are held in memory
_EPOCHS = 10
_LOOKED_AT = 500  # images at once
_SMOOTHING = 0.2
_LOGIT_SCALE = 1 / 9
_SEED = 0
_FACTS = (
    "train_images",
    "test_images",
    "mirrored",
    "test_accuracy",
)  # of a classifier, saved with it


class ClassifierNetwork(nn.Module):
    """A backbone (r2id.evaluation.backbone) and a linear layer."""

    def __init__(self, channels: int, classes: int, size: Size) -> None:
        super().__init__()
        self.backbone = Backbone(channels, size)
        self.head = nn.Linear(Backbone.width, classes, bias=False)

    def features(self, images: Tensor) -> Tensor:
        """Compute features: images [N, C, H, W] in [−1, 1] → float32 [N, D].

        The logits are a linear function of the features.
        """
        return self.backbone(images)

    def logits(self, features: Tensor) -> Tensor:
        """Classify features: [N, D] → [N, classes]."""
        return self.head(features) * _LOGIT_SCALE

    def forward(self, images: Tensor) -> Tensor:
        """Classify images in [−1, 1]: [N, C, H, W] → logits [N, classes]."""
        return self.logits(self.features(images))


@dataclass(frozen=True)
class Classifier:
    """A trained classifier, with its accuracy on real test images.

    It is also a feature extractor (r2id.evaluation.extractor.FeatureExtractor).
    """

    model: ClassifierNetwork
    size: Size
    """Height and width of its input; other images are resized to it."""
    train_images: int
    test_images: int
    mirrored: bool
    """Whether it learned from photographs, which were mirrored and shifted.

    Then its features are means of those of an image and its mirror image.
    """
    test_accuracy: float
    """Accuracy on real images that it was not trained on."""
    name: str = "classifier"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        return hash_of(self.model)

    def classify(self, images: Tensor) -> Tensor:
        """Classify images [N, C, H, W] of any size, in [−1, 1] or uint8 → int64 [N] on the CPU."""
        return self.probabilities(images).argmax(1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Extract features, of images as in ``classify``: [N, C, H, W] → float32 [N, D] on CPU."""
        return self._features(self._inputs(images)).cpu()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return class probabilities, of images as in ``classify``: → float32 [N, classes] on CPU.

        Photographs are looked at in three places, as airbench does: as they are, which counts for
        half, and moved a little up and left, and down and right.
        """
        parts = []
        for part in images.split(_LOOKED_AT):
            inputs = self._inputs(part)
            features = self._features(inputs)
            if self.mirrored:
                moved = [self._features(one) for one in moved_diagonally(inputs)]
                features = features / 2 + sum(moved) / 4
            parts.append(self.model.logits(features).softmax(1).cpu())
        return torch.cat(parts)

    def _inputs(self, images: Tensor) -> Tensor:
        inputs = resize(to_float(images) if images.dtype == torch.uint8 else images, self.size)
        return inputs.to(self.model.head.weight.device)

    def _features(self, inputs: Tensor) -> Tensor:
        with autocast(inputs.device):
            features = self.model.features(inputs)
            if self.mirrored:
                features = (features + self.model.features(inputs.flip(3))) / 2
            return features


def load_or_train_classifier(
    shards: ShardSet, data: DataConfig, file: Path, device: torch.device
) -> Classifier:
    """Return the classifier of a shard set.

    It is read from ``file`` if that holds one trained on the same data by the same recipe.
    Otherwise it is trained and saved there.

    Raises InputError when the training split has fewer than two classes, or the test split has no
    labels.
    """
    size = frequent_size(shards.split(data.train_split))
    data = data.model_copy(update={"size": size, "latents": None})
    identity = identity_of(
        _VERSION, shards.digest, size, data.channels, data.train_split, data.test_split
    )
    found = read_network(
        file, identity, lambda: ClassifierNetwork(data.channels, shards.num_classes, size)
    )
    if found:
        classifier = Classifier(found[0], size, **found[1])
        say(
            f"{file}: classifier found in place, {classifier.test_accuracy:.4f} on "
            f"{classifier.test_images} real test images"
        )
    else:
        classifier = _train_and_test(shards, data, device)
        facts = {name: getattr(classifier, name) for name in _FACTS}
        write_network(file, identity, classifier.model, facts)
    classifier.model.to(device)
    return classifier


def train_network(
    images: Tensor, labels: Tensor, classes: int, device: torch.device, mirrored: bool
) -> ClassifierNetwork:
    """Train a classifier on uint8 images [N, C, H, W] with labels [N] in range(classes).

    Images are shifted and, every other epoch, ``mirrored``; where they may not be, they are
    slightly turned and stretched instead. The same input gives the same weights. The global random
    state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = ClassifierNetwork(images.shape[1], classes, (images.shape[2], images.shape[3]))
    model.backbone.whiten(images)
    model.to(device)
    seen = min(max(FEWEST_IMAGES, _EPOCHS * len(images)), MOST_IMAGES)
    generator = torch.Generator().manual_seed(_SEED)
    first = torch.rand(len(images), generator=generator) < 0.5
    optimizer, schedule = optimizer_and_schedule(model, seen // BATCH)
    with Progress("train classifier", seen // BATCH, unit="images", per_item=BATCH) as progress:
        for chosen, epoch in batches(len(images), seen, generator):
            inputs = to_float(images[chosen])
            if mirrored:  # every other epoch: each image is seen equally often both ways
                inputs = mirror(shift(inputs, generator), first[chosen] ^ (epoch % 2 == 1))
            else:
                inputs = distort(inputs, generator)
            with autocast(device):
                loss = F.cross_entropy(
                    model(inputs.to(device)), labels[chosen].to(device), label_smoothing=_SMOOTHING
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    return model.eval().requires_grad_(False)


def _train_and_test(shards: ShardSet, data: DataConfig, device: torch.device) -> Classifier:
    images, labels = _labelled(*load_images(shards, data, data.train_split, _MOST_IMAGES))
    tests, truth = _labelled(*load_images(shards, data, data.test_split, _MOST_IMAGES))
    if len(labels.unique()) < 2 or not len(tests):
        raise InputError(
            f"{shards.folder}: a classifier takes two classes in split {data.train_split!r} and "
            f"labelled images in split {data.test_split!r}"
        )
    assert data.size is not None
    mirrored = may_be_mirrored(images, labels)
    model = train_network(images, labels, shards.num_classes, device, mirrored)
    classifier = Classifier(model, data.size, len(images), len(tests), mirrored, 0.0)
    return replace(
        classifier, test_accuracy=float((classifier.classify(tests) == truth).double().mean())
    )


def _labelled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images[labels >= 0], labels[labels >= 0]
