"""Resizing a part of a picture: equal to that part of the whole, resized."""

import numpy as np
import pytest
import torch

from r2id.images import resize
from r2id.models.resampling import resample, resample_seen, taps

CASES = [
    ((13, 17), (29, 5)),
    ((28, 28), (14, 14)),
    ((7, 9), (20, 31)),
    ((1, 50), (3, 200)),
    ((64, 48), (9, 48)),
    ((30, 11), (1, 1)),
    ((4, 3), (8, 1)),
    ((9, 1), (4, 1)),
    ((5, 6), (5, 6)),
]
PARTS = [
    (slice(None), slice(None)),
    (slice(0, 1), slice(None)),
    (slice(None, None), slice(1, 4)),
    (slice(2, 7), slice(-3, None)),
]


def part_of(picture, part):
    return picture[:, :, part[0], part[1]]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("size", "out"), CASES)
def test_a_part_is_that_of_the_whole(size, out, part):
    images = torch.rand(2, 3, *size) * 2 - 1
    whole = part_of(resize(images, out), part)
    if whole.numel():
        torch.testing.assert_close(resample(images, out, part), whole, atol=1e-5, rtol=0)


def test_the_size_of_its_own_is_passed_through():
    images = torch.rand(1, 1, 6, 5)
    assert torch.equal(resample(images, (6, 5)), images)
    assert torch.equal(resample(images.bfloat16(), (6, 5)), images.bfloat16().float())
    assert torch.equal(resample(images, (6, 5), (slice(2, 4), slice(1, 3))), images[:, :, 2:4, 1:3])


@pytest.mark.parametrize(("size", "out"), CASES)
def test_pixels_beyond_those_that_are_needed_change_nothing(size, out):
    images = torch.rand(1, 2, *size)
    part = slice(out[0] // 2, out[0] // 2 + 1), slice(0, max(1, out[1] // 3))
    needed = [taps(*side)[0] for side in zip(size, out, part, strict=True)]
    few = resample_seen(
        images[:, :, needed[0], needed[1]], size, out, part, (needed[0].start, needed[1].start)
    )
    torch.testing.assert_close(few, resample_seen(images, size, out, part, (0, 0)))
    torch.testing.assert_close(few, part_of(resize(images, out), part), atol=1e-5, rtol=0)


def test_a_part_sees_few_pixels():
    """Two on each side of where a pixel is; and twice as many times as it is larger."""
    seen, weights = taps(10**6, 10**6 * 3, slice(5000, 5001))
    assert seen.stop - seen.start <= 4 and weights.shape == (1, seen.stop - seen.start)
    seen, _ = taps(10**6, 10**4, slice(50, 51))
    assert 300 < seen.stop - seen.start <= 402


@pytest.mark.parametrize(("count", "out"), [(7, 30), (30, 7), (1, 9), (9, 1), (8, 8)])
def test_flat_pictures_stay_flat(count, out):
    _, weights = taps(count, out)
    np.testing.assert_allclose(weights.sum(1), 1)


def test_gradients_are_those_of_resizing():
    images, toward = torch.rand(1, 1, 9, 8), torch.rand(1, 1, 5, 13)
    gradients = []
    for enlarge in (resize, lambda image, size: resample(image, size, (slice(0, 5), slice(0, 13)))):
        image = images.clone().requires_grad_()
        (enlarge(image, (5, 13)) * toward).sum().backward()
        gradients.append(image.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=0)


def test_autocast_changes_nothing():
    images, part = torch.rand(2, 3, 13, 17) * 2 - 1, (slice(2, 7), slice(-3, None))
    plain = resample(images, (29, 40), part)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(images, (29, 40), part), plain)
