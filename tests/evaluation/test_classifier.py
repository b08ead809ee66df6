"""The classifier: its accuracy, its cache file and its training data."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import classifier as classifier_module
from r2id.evaluation.classifier import ClassifierNetwork, load_or_train_classifier, train_network
from r2id.evaluation.images import frequent_size, load_images
from r2id.evaluation.saved import read_network
from r2id.images import to_float, to_uint8
from tests.evaluation.folders import write_folder


def test_accuracy_on_held_out_digits(shards, data, tmp_path):
    file = tmp_path / "classifier.safetensors"
    classifier = load_or_train_classifier(shards, data, file, torch.device("cpu"))
    assert classifier.size == (8, 8)
    assert classifier.test_accuracy >= 0.99
    assert (classifier.train_images, classifier.test_images) == (1438, 359)


def test_images_of_another_size_are_resized(classifier, shards, data):
    images, labels = load_images(shards, data.model_copy(update={"size": (24, 24)}), "test")
    features, classes = classifier.features(images), classifier.classify(images)
    assert features.shape == (359, 192) and features.dtype == torch.float32
    assert (classes == labels).double().mean() > 0.97
    again = torch.cat([classifier.features(some) for some in to_float(images).split(100)])
    torch.testing.assert_close(again, features, atol=1e-4, rtol=1e-4)


def test_features_of_mirrored_images_are_the_same_where_they_may_be_mirrored(classifier):
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not classifier.mirrored  # of digits
    one, other = classifier.features(images), classifier.features(images.flip(3))
    assert (one - other).abs().max() > 0.1
    both = replace(classifier, mirrored=True)
    for features in (both.features(images), both.features(images.flip(3))):
        torch.testing.assert_close(features, (one + other) / 2)


def test_photographs_are_classified_in_three_places(classifier):
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logits = lambda images: classifier.model.logits(classifier.features(images))  # noqa: E731
    # Digits are looked at as they are.
    torch.testing.assert_close(classifier.probabilities(images), logits(images).softmax(1))

    # Half of the most that they are shifted by in training is one pixel; the border is reflected.
    padded = torch.cat([images[:, :, 1:2], images, images[:, :, -2:-1]], 2)
    padded = torch.cat([padded[..., 1:2], padded, padded[..., -2:-1]], 3)
    photographs = replace(classifier, mirrored=True)
    features = (
        photographs.features(images) / 2
        + photographs.features(padded[:, :, :8, :8]) / 4
        + photographs.features(padded[:, :, 2:, 2:]) / 4
    )
    expected = classifier.model.logits(features).softmax(1)
    found = photographs.probabilities(images)
    torch.testing.assert_close(found, expected)
    assert (found - logits(images).softmax(1)).abs().max() > 1e-3
    assert photographs.classify(images).equal(found.argmax(1))
    assert photographs.probabilities(to_uint8(images)).shape == (6, 10)


def test_it_is_saved_and_read_again(classifier, classifier_file, shards, data):
    before = classifier_file.stat().st_mtime_ns
    again = load_or_train_classifier(shards, data, classifier_file, torch.device("cpu"))
    assert classifier_file.stat().st_mtime_ns == before
    assert again.test_accuracy == classifier.test_accuracy
    for name, tensor in classifier.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_a_stale_or_damaged_file_is_not_used(classifier, classifier_file, tmp_path, capsys):
    with safe_open(classifier_file, "pt") as opened:
        identity = json.loads(opened.metadata()["r2id"])["identity"]
    read = lambda file, wanted: read_network(  # noqa: E731
        file, wanted, lambda: ClassifierNetwork(1, 10, (8, 8))
    )
    assert read(classifier_file, identity) is not None
    assert read(classifier_file, "another data set's") is None
    assert read(tmp_path / "none", identity) is None
    capsys.readouterr()
    (tmp_path / "cut").write_bytes(classifier_file.read_bytes()[:5000])
    assert read(tmp_path / "cut", identity) is None
    assert "damaged" in capsys.readouterr().err


def test_the_same_data_gives_the_same_classifier(monkeypatch):
    monkeypatch.setattr(classifier_module, "FEWEST_IMAGES", 384)
    monkeypatch.setattr(classifier_module, "MOST_IMAGES", 384)
    images, labels = torch.randint(0, 256, (50, 3, 9, 7), dtype=torch.uint8), torch.arange(50) % 4
    torch.manual_seed(1)
    one = train_network(images, labels, 4, torch.device("cpu"), True)
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    other = train_network(images, labels, 4, torch.device("cpu"), True)
    assert torch.equal(torch.rand(1), drawn)  # the global stream is left alone
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (28, 28), (64, 64), (7, 5)])
def test_any_size(size):
    assert ClassifierNetwork(3, 5, size).eval()(torch.zeros(2, 3, *size)).shape == (2, 5)


def test_size_that_most_images_have():
    split = SimpleNamespace(height=np.array([8, 30, 8]), width=np.array([6, 30, 6]))
    assert frequent_size(split) == (8, 6)
    split = SimpleNamespace(height=np.array([300]), width=np.array([1200]))
    assert frequent_size(split) == (32, 128)


def test_data_without_two_classes(tmp_path):
    shards = write_folder(tmp_path, {"train/a": 5, "test/a": 3})
    with pytest.raises(InputError, match="'train'"):
        load_or_train_classifier(
            ShardSet.open(shards),
            DataConfig(shards=shards),
            tmp_path / "classifier",
            torch.device("cpu"),
        )
