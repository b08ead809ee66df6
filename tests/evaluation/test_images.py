"""Resizing, and images in memory."""

import numpy as np
import pytest
import torch
from PIL import Image

from r2id.data.records import decode
from r2id.evaluation.images import load_images, resize
from r2id.images import to_float


def test_resizing_keeps_what_it_should():
    images = torch.rand(2, 1, 12, 8) * 2 - 1
    assert resize(images, (12, 8)) is images
    torch.testing.assert_close(
        resize(torch.full((1, 3, 8, 8), 0.25), (3, 31)), torch.full((1, 3, 3, 31), 0.25)
    )
    smaller = resize(images, (1, 1))
    torch.testing.assert_close(smaller.flatten(), images.mean((1, 2, 3)), atol=0.1, rtol=0)
    edge = torch.cat([torch.full((1, 1, 4, 4), -1.0), torch.full((1, 1, 4, 4), 1.0)], dim=3)
    assert resize(edge, (16, 32)).abs().max() <= 1  # bicubic overshoots


def test_resizing_is_pillows():
    array = np.random.default_rng(0).random((20, 30), dtype=np.float32)
    expected = np.asarray(Image.fromarray(array).resize((11, 7), Image.Resampling.BICUBIC))
    found = resize(torch.from_numpy(array).reshape(1, 1, 20, 30), (7, 11))[0, 0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_images_in_memory_are_the_stored_ones(shards, data):
    images, labels = load_images(shards, data.model_copy(update={"size": (8, 8)}), "test")
    split = shards.split("test")
    assert images.dtype == torch.uint8 and images.shape == (len(split), 1, 8, 8)
    assert labels.tolist() == split.label.tolist()
    assert np.array_equal(images[17, 0], decode(split.read(17), 1)[..., 0])
    assert to_float(images).min() == -1 and to_float(images).max() == 1
    assert (
        len(load_images(shards, data.model_copy(update={"size": (5, 9)}), "test", limit=7)[0]) == 7
    )


@pytest.mark.parametrize("size", [(1, 1), (64, 3)])
def test_any_size(size):
    assert resize(torch.zeros(1, 1, 8, 8), size).shape == (1, 1, *size)
