"""The convolutional network of the evaluation's own feature extractors, and how it is trained.

It follows airbench (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds", arXiv 2404.00498), which learns
to see in minutes: the first convolution whitens patches of 2×2 pixels and stays as computed; three
groups of two convolutions pool by their maximum; batch normalisation has no scale; convolutions
start as the identity; SGD with Nesterov's momentum and large rates for biases.

Shape letters: N images · C colours · H, W image · D features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2id.images import to_float
from r2id.models.coords import Size

_PATCH = 2  # pixels: side of the whitened patches
_LARGE = 40  # pixels: where a side is longer, the patches do not overlap, which halves the sides
_WIDTHS = (48, 96, 192)  # channels of the three groups
_WHITENED = 2000  # images, evenly spaced, whose patches are whitened
_LEAST_VARIANCE = 5e-4  # added to the patches' variances, so that noise is not blown up
_SHIFT = 16  # images are shifted by at most this part of a side
_ROTATION, _SCALE, _MOVE = 0.2, 0.15, 0.12  # radians, log of the factor, share of half a side
_LOPSIDED = 0.02  # from here on, images are not mirrored
BATCH = 128
FEWEST_IMAGES, MOST_IMAGES = 400 * BATCH, 200_000  # seen in training, images of all epochs
_LEARNING_RATE, _MOMENTUM, _DECAY, _BIAS_RATE = 0.19, 0.85, 2.5e-4, 64  # decay: share per step
_PEAK, _FIRST, _LAST = 0.23, 0.2, 0.07  # of the schedule: where, and rates relative to the peak's


class Backbone(nn.Module):
    """A convolution that whitens, then three groups of two, each of which halves the image."""

    width = _WIDTHS[-1]
    """Number of features, D."""

    def __init__(self, channels: int, size: Size) -> None:
        super().__init__()
        filters = 2 * channels * _PATCH**2
        stride = _PATCH if max(size) > _LARGE else 1
        self.whitening = nn.Conv2d(channels, filters, _PATCH, stride, bias=False)
        layers: list[nn.Module] = []
        for width in _WIDTHS:
            layers += [_convolution(filters, width), nn.MaxPool2d(2, ceil_mode=True)]
            layers += [_normalisation(width), nn.GELU(), _convolution(width, width)]
            layers += [_normalisation(width), nn.GELU()]
            filters = width
        self.layers = nn.Sequential(*layers)
        self.whitening.requires_grad_(False)

    def whiten(self, images: Tensor) -> None:
        """Set the first convolution by uint8 images [N, C, H, W]; training leaves it as it is.

        Its filters are the principal directions of the images' patches, scaled to unit variance,
        and their negatives.
        """
        weight = self.whitening.weight
        some = to_float(images[:: -(-len(images) // _WHITENED)]).to(weight)
        patches = F.unfold(_padded(some), _PATCH).transpose(1, 2).flatten(0, 1).double()
        variances, directions = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (directions / (variances + _LEAST_VARIANCE).sqrt()).T.reshape(
            -1, *weight.shape[1:]
        )
        weight.data.copy_(torch.cat([filters, -filters]))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the maxima of the last group over places: images [N, C, H, W] → [N, D].

        Images are in [−1, 1]. Features are float32.
        """
        inputs = _padded(images).contiguous(memory_format=torch.channels_last)
        return self.layers(F.gelu(self.whitening(inputs))).float().amax((2, 3))


def _padded(images: Tensor) -> Tensor:
    # A patch starts at every pixel, so that the smallest image has one.
    return F.pad(images, (0, _PATCH - 1) * 2, mode="replicate")


def _convolution(channels: int, width: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight.data[:channels])
    layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return layer


def _normalisation(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width)
    layer.weight.requires_grad_(False)
    return layer


def optimizer_and_schedule(
    model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return SGD with a rate that rises and falls linearly, for all weights that are trained."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {
            "params": [weight for weight in trained if (weight.dim() == 1) == biases],
            "lr": rate,
            "weight_decay": _DECAY / rate,
        }
        for biases, rate in ((True, _LEARNING_RATE * _BIAS_RATE), (False, _LEARNING_RATE))
    ]
    optimizer = torch.optim.SGD(groups, momentum=_MOMENTUM, nesterov=True)
    peak = _PEAK * steps

    def rate(step: int) -> float:
        if step < peak:
            return _FIRST + (1 - _FIRST) * step / peak
        return 1 - (1 - _LAST) * (step - peak) / (steps - peak)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def batches(count: int, seen: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield numbers [BATCH] of images, each once per epoch, and the epochs [BATCH] they are of."""
    epochs = -(-seen // count)
    order = torch.cat([torch.randperm(count, generator=generator) for _ in range(epochs)])
    epoch = torch.arange(epochs).repeat_interleave(count)
    whole = seen // BATCH * BATCH
    yield from zip(order[:whole].split(BATCH), epoch[:whole].split(BATCH), strict=True)


def may_be_mirrored(images: Tensor, labels: Tensor) -> bool:
    """Whether uint8 images [N, C, H, W] of a class [N] look alike when left and right swap.

    Photographs do; digits and letters do not, and their classes would be confused. Let d be an
    image less its mirror image. If a class is as likely to be seen either way round, the d of two
    of its images are independent with mean 0, so that their inner product is 0 on average; it is
    compared with the mean of |d|². It is at most 0.001 in photographs of animals and vehicles, and
    0.15 to 0.33 in handwritten digits.
    """
    products, squares = torch.zeros(2, dtype=torch.float64)
    for label in labels.unique():
        some = images[labels == label][:_WHITENED].float()
        if len(some) < 2:
            continue
        lopsided = (some - some.flip(3)).flatten(1)
        square = lopsided.square().sum().double()
        total = lopsided.sum(0).square().sum().double()
        products += (total - square) / (len(some) - 1)
        squares += square
    return bool(products < _LOPSIDED * squares)


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Apply a small random rotation, scaling of both axes and shift: [N, C, H, W] → same shape."""
    turn, *scales, right, down = (2 * torch.rand(5, len(images), generator=generator) - 1).unbind()
    cos, sin = (_ROTATION * turn).cos(), (_ROTATION * turn).sin()
    wide, high = (torch.exp(_SCALE * scale) for scale in scales)
    matrix = torch.stack(
        [
            torch.stack([cos * wide, -sin * high, _MOVE * right], 1),
            torch.stack([sin * wide, cos * high, _MOVE * down], 1),
        ],
        1,
    )
    coords = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images, coords, padding_mode="border", align_corners=False)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by whole pixels, up to a sixteenth of the sides: [N, C, H, W] → the same.

    What comes in at the border is reflected.
    """
    sides = images.shape[2:]
    room = _room(images)
    padded = F.pad(images, (room[1], room[1], room[0], room[0]), mode="reflect")
    rows, columns = (
        torch.randint(0, 2 * most + 1, (len(images), 1), generator=generator) + torch.arange(side)
        for most, side in zip(room, sides, strict=True)
    )
    number = torch.arange(len(images))[:, None, None, None]
    colour = torch.arange(images.shape[1])[:, None, None]
    return padded[number, colour, rows[:, None, :, None], columns[:, None, None, :]]


def moved_diagonally(images: Tensor) -> tuple[Tensor, Tensor]:
    """Move images [N, C, H, W] up and left, and down and right, by half of what ``shift`` may."""
    height, width = images.shape[2:]
    down, right = (-(-most // 2) for most in _room(images))
    padded = F.pad(images, (right, right, down, down), mode="reflect")
    return padded[:, :, 2 * down :, 2 * right :], padded[:, :, :height, :width]


def _room(images: Tensor) -> list[int]:
    """Return by how many rows and columns images [N, C, H, W] may be shifted."""
    return [min(max(1, round(side / _SHIFT)), side - 1) for side in images.shape[2:]]


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Swap left and right of the images [N, C, H, W] that are chosen, bool [N]."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def autocast(device: torch.device) -> AbstractContextManager[None]:
    """Compute in bfloat16 on GPUs alone: many CPUs are slower in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
