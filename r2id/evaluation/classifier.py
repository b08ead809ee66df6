"""Train a small convolutional classifier on real images of the evaluated shard set.

It measures the class accuracy of samples. It is also the default feature extractor for Fréchet
distances, precision and recall (r2id.evaluation.extractor). Its own accuracy on real test images is
reported beside every figure that depends on it.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from r2id.config import DataConfig
from r2id.data.shards import ShardSet, Split
from r2id.errors import InputError
from r2id.evaluation.images import load_images, resize
from r2id.files import write_atomic
from r2id.images import to_float
from r2id.models.coords import Size
from r2id.progress import Progress, say

# Version of the training recipe below: raise it when the recipe changes, so that saved classifiers
# are trained again.
_VERSION = 1
_WIDTHS = (32, 64, 128)  # channels of the three stages
_LARGEST_AREA = 64 * 64  # pixels: larger images are shrunk to this area before they are classified
_MOST_IMAGES = 200_000  # of a split, evenly spaced: they are held in memory
_BATCH = 128
_EPOCHS, _FEWEST_STEPS, _MOST_STEPS = 6, 400, 4000
_LEARNING_RATE, _WEIGHT_DECAY, _WARM_UP, _SMOOTHING = 3e-3, 0.05, 0.15, 0.05
_ROTATION, _SCALE, _SHIFT = 0.2, 0.15, 0.12  # radians, log of the factor, share of half a side
_SEED = 0


class ClassifierNetwork(nn.Module):
    """Three stages of two convolutions; each stage halves the image if it is large enough."""

    def __init__(self, channels: int, classes: int, size: Size) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        side = max(size)
        for stage, width in enumerate(_WIDTHS):
            stride = 2 if side > (12 if stage == 0 else 4) else 1
            layers += [_convolution(channels, width, stride), _convolution(width, width, 1)]
            channels, side = width, -(-side // stride)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def features(self, images: Tensor) -> Tensor:
        """Compute the spatial means of the last stage: images [N, C, H, W] → float32 [N, D].

        Images are in [−1, 1]. The logits are a linear function of the features.
        """
        return self.body(images.contiguous(memory_format=torch.channels_last)).float().mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Classify images in [−1, 1]: [N, C, H, W] → logits [N, classes]."""
        return self.head(self.features(images))


def _convolution(channels: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(True),
    )


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
    test_accuracy: float
    """Accuracy on real images that it was not trained on."""
    name: str = "classifier"

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the weights, hexadecimal."""
        return hashlib.sha256(save(_tensors(self.model))).hexdigest()

    def classify(self, images: Tensor, batch: int = 500) -> Tensor:
        """Classify images [N, C, H, W] of any size, in [−1, 1] or uint8 → int64 [N] on the CPU."""
        features = torch.cat([self.features(part) for part in images.split(batch)])
        return self.probabilities(features).argmax(1)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Extract features, of images as in ``classify``: [N, C, H, W] → float32 [N, D] on CPU."""
        device = self.model.head.weight.device
        inputs = resize(to_float(images) if images.dtype == torch.uint8 else images, self.size)
        with torch.autocast(device.type, torch.bfloat16):
            return self.model.features(inputs.to(device)).cpu()

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """Return class probabilities: features [N, D] → float32 [N, classes], on the CPU."""
        return self.model.head(features.to(self.model.head.weight.device)).softmax(1).cpu()


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
    identity = _identity(shards, data)
    classifier = _read(file, identity, data.channels, shards.num_classes, size)
    if classifier is None:
        classifier = _train_and_test(shards, data, device)
        _write(file, identity, classifier)
    classifier.model.to(device)
    return classifier


def frequent_size(split: Split) -> Size:
    """Return the most frequent (height, width) of a split, shrunk to an area of at most 64×64.

    The aspect ratio is kept.
    """
    sizes, counts = np.unique(np.stack([split.height, split.width], 1), axis=0, return_counts=True)
    height, width = (int(side) for side in sizes[counts.argmax()])
    scale = min(1.0, (_LARGEST_AREA / (height * width)) ** 0.5)
    return max(1, round(height * scale)), max(1, round(width * scale))


def train_network(
    images: Tensor, labels: Tensor, classes: int, device: torch.device
) -> ClassifierNetwork:
    """Train a classifier on uint8 images [N, C, H, W] with labels [N] in range(classes).

    The same input gives the same weights. The global random state stays as it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = ClassifierNetwork(images.shape[1], classes, (images.shape[2], images.shape[3]))
    model.to(device)
    steps = min(max(_FEWEST_STEPS, _EPOCHS * len(images) // _BATCH), _MOST_STEPS)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_LEARNING_RATE, weight_decay=_WEIGHT_DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, _LEARNING_RATE, total_steps=steps, pct_start=_WARM_UP
    )
    generator = torch.Generator().manual_seed(_SEED)
    epochs = -(-steps * _BATCH // len(images))
    order = torch.cat([torch.randperm(len(images), generator=generator) for _ in range(epochs)])
    with Progress("train classifier", steps, unit="images", per_item=_BATCH) as progress:
        for chosen in order[: steps * _BATCH].split(_BATCH):
            inputs = augment(to_float(images[chosen]), generator).to(device)
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(
                    model(inputs), labels[chosen].to(device), label_smoothing=_SMOOTHING
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance()
    return model.eval().requires_grad_(False)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a small random rotation, scaling of both axes and shift: [N, C, H, W] → same shape."""
    turn, *scales, right, down = (2 * torch.rand(5, len(images), generator=generator) - 1).unbind()
    cos, sin = (_ROTATION * turn).cos(), (_ROTATION * turn).sin()
    wide, high = (torch.exp(_SCALE * scale) for scale in scales)
    matrix = torch.stack(
        [
            torch.stack([cos * wide, -sin * high, _SHIFT * right], 1),
            torch.stack([sin * wide, cos * high, _SHIFT * down], 1),
        ],
        1,
    )
    coords = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, coords, padding_mode="border", align_corners=False)


def _train_and_test(shards: ShardSet, data: DataConfig, device: torch.device) -> Classifier:
    images, labels = _labelled(*load_images(shards, data, data.train_split, _MOST_IMAGES))
    tests, truth = _labelled(*load_images(shards, data, data.test_split, _MOST_IMAGES))
    if len(labels.unique()) < 2 or not len(tests):
        raise InputError(
            f"{shards.folder}: a classifier takes two classes in split {data.train_split!r} and "
            f"labelled images in split {data.test_split!r}"
        )
    assert data.size is not None
    classifier = Classifier(
        train_network(images, labels, shards.num_classes, device),
        data.size,
        len(images),
        len(tests),
        0.0,
    )
    return replace(
        classifier, test_accuracy=float((classifier.classify(tests) == truth).double().mean())
    )


def _labelled(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return images[labels >= 0], labels[labels >= 0]


def _identity(shards: ShardSet, data: DataConfig) -> str:
    """Hash what a classifier depends on: the data and the recipe."""
    facts = [_VERSION, shards.digest, data.size, data.channels, data.train_split, data.test_split]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write(file: Path, identity: str, classifier: Classifier) -> None:
    facts = {
        "identity": identity,
        "train_images": classifier.train_images,
        "test_images": classifier.test_images,
        "test_accuracy": classifier.test_accuracy,
    }
    write_atomic(file, save(_tensors(classifier.model), {"r2id": json.dumps(facts)}))


def _tensors(model: ClassifierNetwork) -> dict[str, Tensor]:
    return {name: value.cpu().contiguous() for name, value in model.state_dict().items()}


def _read(file: Path, identity: str, channels: int, classes: int, size: Size) -> Classifier | None:
    """Read a saved classifier; None when there is none, or it is damaged or of other data."""
    try:
        with safe_open(file, "pt") as opened:
            facts = json.loads(opened.metadata()["r2id"])
            if facts.pop("identity") != identity:
                return None
            model = ClassifierNetwork(channels, classes, size)
            model.load_state_dict({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
            classifier = Classifier(model.eval().requires_grad_(False), size, **facts)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError):
        say(f"{file}: damaged; training the classifier again")
        return None
    say(
        f"{file}: classifier found in place, {classifier.test_accuracy:.4f} on "
        f"{classifier.test_images} real test images"
    )
    return classifier
