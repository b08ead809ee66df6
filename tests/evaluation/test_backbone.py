"""The network of the evaluation's own extractors, and its augmentation."""

import pytest
import torch

from r2id.evaluation.backbone import (
    BATCH,
    Backbone,
    batches,
    distort,
    may_be_mirrored,
    mirror,
    shift,
)
from r2id.evaluation.images import load_images
from r2id.images import to_float


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (40, 40), (41, 41), (7, 5)])
def test_any_size(size):
    images = torch.randint(0, 256, (3, 1, *size), dtype=torch.uint8)
    backbone = Backbone(1, size).eval()
    backbone.whiten(images)
    features = backbone(to_float(images))
    assert features.shape == (3, Backbone.width) and features.isfinite().all()


@pytest.mark.parametrize("size", [(16, 16), (48, 44)])
def test_the_first_convolution_whitens_patches(size):
    noise = torch.randint(0, 256, (40, 3, *size), dtype=torch.uint8)
    images = (noise.float().cumsum(2).cumsum(3) % 200).to(torch.uint8)
    backbone = Backbone(3, size)
    backbone.whiten(images)
    responses = backbone.whitening(to_float(images)).transpose(0, 1).flatten(1)
    first, negative = responses.split(12)
    torch.testing.assert_close(first, -negative)
    covariance = first @ first.T / first.shape[1]
    assert covariance.diagonal() == pytest.approx(1, abs=0.25)
    assert (covariance - covariance.diagonal().diag()).abs().max() < 0.2
    assert not backbone.whitening.weight.requires_grad


def test_digits_are_not_mirrored_and_textures_are(shards, data):
    digits, labels = load_images(shards, data.model_copy(update={"size": (8, 8)}), "train")
    assert not may_be_mirrored(digits, labels)
    both = torch.cat([digits, digits.flip(3)]), torch.cat([labels, labels])
    assert may_be_mirrored(*both)
    noise = torch.randint(0, 256, (60, 3, 9, 8), dtype=torch.uint8)
    assert may_be_mirrored(noise, torch.arange(60) % 4)
    noise[..., :4] //= 2  # the left is darker in every image
    assert not may_be_mirrored(noise, torch.arange(60) % 4)


def test_shifts_are_whole_pixels_and_reflect():
    ramp = torch.arange(32.0).expand(200, 1, 32, 32)
    moved = shift(ramp, torch.Generator().manual_seed(0))
    steps = (moved - ramp)[:, 0, :, 10]
    assert (steps == steps[:, :1]).all() and set(steps[:, 0].tolist()) == {-2, -1, 0, 1, 2}
    assert moved.min() == 0 and moved.max() == 31
    one = torch.ones(4, 2, 1, 1)
    assert shift(one, torch.Generator()).equal(one)


def test_mirror_swaps_left_and_right_of_the_chosen():
    images = torch.arange(24.0).reshape(2, 1, 3, 4)
    mirrored = mirror(images, torch.tensor([True, False]))
    assert mirrored[0].equal(images[0].flip(2)) and mirrored[1].equal(images[1])


def test_every_image_is_seen_once_per_epoch():
    seen = list(batches(300, 700, torch.Generator().manual_seed(0)))
    assert len(seen) == 700 // BATCH and all(len(chosen) == BATCH for chosen, _ in seen)
    chosen, epochs = (torch.cat(part) for part in zip(*seen, strict=True))
    assert chosen[epochs == 0].sort().values.tolist() == list(range(300))
    assert epochs.tolist() == sorted(epochs.tolist()) and epochs.max() == 2


def test_distortion_is_mild():
    images = torch.zeros(200, 1, 28, 28)
    images[:, :, 10:18, 10:18] = 1
    moved = distort(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved[0], moved[1])
    mass = moved.sum((1, 2, 3)) / 64
    assert mass.min() > 0.7 and mass.max() < 1.4
    assert (
        moved * (1 - torch.nn.functional.max_pool2d(images, 15, 1, 7))
    ).max() == 0  # within 7 pixels
