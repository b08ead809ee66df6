"""Reconstructions at the native size and at other scales."""

import pytest
import torch

from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.evaluation.images import load_images
from r2id.evaluation.metrics import frechet_distance
from r2id.evaluation.riae import SCALES, measure_riae, reconstruct_examples
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.models.coords import scale_size
from tests.evaluation.folders import write_folder


@pytest.fixture(scope="module")
def codec(riae_run):
    return Codec.load(riae_run)


@pytest.fixture(scope="module")
def measured(codec, shards, data):
    return measure_riae(codec, shards, data)


def test_native_error_is_that_of_the_whole_test_split(codec, measured, shards, data):
    images = to_float(load_images(shards, data.model_copy(update={"size": (8, 8)}), "test")[0])
    error = (codec.decode(codec.encode(images), (8, 8)) - images).square().flatten(1).mean(1)
    assert measured["native"]["mse"] == pytest.approx(float(error.mean()), rel=0.01)
    assert measured["native"]["psnr"] == pytest.approx(
        float((10 * torch.log10(4 / error)).mean()), abs=0.05
    )


def test_every_scale_is_measured(measured):
    assert list(measured) == list(SCALES)
    assert {name: tuple(row["size"]) for name, row in measured.items()} == {
        "native": (8, 8),
        "half": (4, 4),
        "double": (16, 16),
        "taller": (12, 8),
        "wider": (8, 12),
    }
    for name, row in measured.items():
        assert (
            row["images"] == 359
            and 0 < row["mse"] < 4
            and 0 < row["psnr"] < 106
            and -1 < row["ssim"] < 1
        )
        assert ("mse_encoded" in row) == (name != "native")


def test_distance_to_the_originals_in_an_extractors_features(
    codec, measured, classifier, shards, data
):
    assert measured["native"]["frechet"] is None
    found = measure_riae(codec, shards, data, classifier)
    images = to_float(load_images(shards, data.model_copy(update={"size": (8, 8)}), "test")[0])
    expected = frechet_distance(
        classifier.features(codec.decode(codec.encode(images), (8, 8))), classifier.features(images)
    )
    assert found["native"]["frechet"] == pytest.approx(expected, rel=0.05)
    assert found["double"]["frechet"] > 0 and found["native"]["mse"] == measured["native"]["mse"]


def test_images_of_many_sizes(codec, tmp_path):
    folder = write_folder(tmp_path, {"train/a": 1, "test/a": 6}, ((9, 5), (9, 5), (1, 1)))
    shards, data = ShardSet.open(folder), DataConfig(shards=folder)
    measured = measure_riae(codec, shards, data)
    assert measured["native"]["size"] == [9, 5] and measured["native"]["images"] == 6
    pictures = reconstruct_examples(codec, shards, data)
    assert [tuple(image.shape) for image in pictures.rendered["double"]].count((1, 18, 10)) == 4
    assert all(len(images) == 6 for images in pictures.rendered.values())


def test_scaled_sizes_are_never_empty():
    assert scale_size((1, 3), (0.5, 0.5)) == (1, 2) and scale_size((1, 1), (0.1, 2)) == (1, 2)
