"""Nearest training images of samples."""

import pytest
import torch

from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.images import load_images
from r2id.evaluation.metrics import nearest
from r2id.evaluation.neighbours import (
    NEIGHBOURS,
    SHOWN,
    check_training_images,
    find_neighbours,
    measure_copies,
)
from r2id.images import to_float
from tests.evaluation.folders import write_folder


@pytest.fixture(scope="module")
def at_native(data):
    return data.model_copy(update={"size": (8, 8)})


def test_copies_of_training_images_are_found(classifier, shards, data, at_native):
    training, tests = (to_float(load_images(shards, at_native, s)[0]) for s in ("train", "test"))
    copies = training[100:1300:12]
    features = classifier.features(tests)
    found, facts = find_neighbours(copies, features, classifier, shards, data)
    assert len(found.samples) == len(found.images) == SHOWN
    assert found.distances.shape == (SHOWN, NEIGHBOURS)
    for copy, images in zip(found.samples, found.images, strict=True):
        assert len(images) == NEIGHBOURS
        torch.testing.assert_close(images[0], copy, atol=0.02, rtol=0)
    assert found.distances[:, 0].max() < 0.01 < found.distances[:, 1].min()
    assert facts["near"] == 1 and facts["training_images"] == len(training)
    _, honest = find_neighbours(tests, features, classifier, shards, data)
    assert 0 < honest["near"] <= 0.012
    assert honest["median_distance"] == pytest.approx(honest["median_distance_of_test_images"])


def test_share_of_copies():
    generator = torch.Generator().manual_seed(0)
    training, tests, honest = torch.randn(3, 500, 6, generator=generator)
    samples = torch.cat([honest[:300], training[:100]])
    found = measure_copies(samples, tests, training)
    assert found["near"] == pytest.approx(0.26, abs=0.02)
    # Test images that training has seen change nothing, not even where there are no others.
    assert measure_copies(samples, torch.cat([tests, training[:50]]), training) == {
        **found,
        "test_images_in_training": 50,
    }
    assert measure_copies(samples, training[:50], training)["near"] == 0.25


def test_nearest_are_in_order():
    others = torch.tensor([[0.0], [5.0], [1.0], [9.0]])
    distances, indices = nearest(torch.tensor([[1.4], [8.0]]), others, 2)
    assert indices.tolist() == [[2, 0], [3, 1]]
    assert distances.flatten().tolist() == pytest.approx([0.4, 1.4, 1.0, 3.0])
    with pytest.raises(ValueError, match="5 neighbours of 4"):
        nearest(others, others, 5)


def test_more_neighbours_than_images(data, tmp_path):
    shards = ShardSet.open(write_folder(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 4}))
    with pytest.raises(InputError, match="'train' has 2 images; the 3 nearest") as error:
        check_training_images(shards, data)
    assert "\n" not in str(error.value)
