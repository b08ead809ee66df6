"""The extractor of images without classes."""

import pytest
import torch

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.extractor import FeatureExtractor
from r2id.evaluation.images import load_images, resize
from r2id.evaluation.metrics import frechet_distance
from r2id.evaluation.self_supervised import (
    SelfSupervisedExtractor,
    load_or_train_extractor,
    train_backbone,
    vicreg_loss,
    view,
)
from r2id.images import to_float
from tests.evaluation.folders import write_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digit_images(shards, data):
    return [
        load_images(shards, data.model_copy(update={"size": (8, 8)}), split)[0]
        for split in ("train", "test")
    ]


@pytest.fixture(scope="module")
def extractor(digit_images) -> FeatureExtractor:
    train, _ = digit_images
    return SelfSupervisedExtractor(train_backbone(train, CPU, 60 * 128), (8, 8), len(train))


def test_it_orders_images_by_how_real_they_are(extractor, digit_images):
    train, tests = map(to_float, digit_images)
    real = extractor.features(tests)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(train.shape, generator=generator)
    real_ones, *worse = (
        [frechet_distance(extractor.features(images.clamp(-1, 1)), real) for images in row]
        for row in (
            [train],
            [resize(train, (7, 7)), resize(train, (5, 5))],
            [train + 0.2 * noise, train + 0.5 * noise],
        )
    )
    for milder, stronger in worse:
        assert 0 < real_ones[0] < milder < stronger


def test_its_features_tell_digits_apart_without_their_classes(extractor, shards, digit_images):
    labels = [torch.from_numpy(shards.split(name).label).long() for name in ("train", "test")]
    train, tests = (extractor.features(to_float(images)) for images in digit_images)
    nearest = torch.cdist(tests, train).argmin(1)
    assert (labels[0][nearest] == labels[1]).double().mean() > 0.9
    assert train.std(0).min() > 0  # no dimension has collapsed


def test_views_differ_and_stay_images():
    images = torch.rand(50, 3, 12, 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    generator = torch.Generator().manual_seed(1)
    one, other = (view(images, generator, True) for _ in range(2))
    assert one.shape == images.shape and not one.equal(other)
    assert one.abs().max() <= 1


def test_the_loss_by_hand():
    spread = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    assert float(vicreg_loss(spread, spread)) == pytest.approx(0, abs=1e-6)
    assert float(vicreg_loss(spread, spread + 2)) == pytest.approx(4)
    flat = torch.zeros(4, 2)  # all alike: each view lacks a deviation of 1
    assert float(vicreg_loss(flat, flat)) == pytest.approx(0.99)
    same = spread[:, :1].expand(4, 2)  # both dimensions are one: covariance 18 / 3
    assert float(vicreg_loss(same, same)) == pytest.approx(2 * 0.04 * 2 * 6**2 / 2)


def test_one_image_is_not_enough(tmp_path):
    shards = write_folder(tmp_path, {"train": 1, "test": 1})
    with pytest.raises(InputError, match="'train', which has 1"):
        load_or_train_extractor(
            ShardSet.open(shards), DataConfig(shards=shards), tmp_path / "extractor", CPU
        )
