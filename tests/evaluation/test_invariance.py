"""Metrics by size, checked against direct computation."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from r2id.evaluation import invariance
from r2id.evaluation.images import load_images, resize
from r2id.evaluation.invariance import (
    halve,
    invariance_sizes,
    measure_reconstructions,
    measure_samples,
    score_consistency,
    score_stretched,
)
from r2id.evaluation.metrics import mse, ssim
from r2id.evaluation.r2id import Samples
from r2id.evaluation.reference import extract_features, real_batches
from r2id.images import psnr, to_float


def test_sizes_are_the_stated_ones_and_the_same_shares_of_others():
    assert invariance_sizes((28, 28)) == [
        (10, 10),
        (14, 14),
        (16, 16),
        (28, 28),
        (32, 32),
        (40, 24),
        (24, 40),
        (18, 32),
        (32, 18),
        (27, 18),
        (18, 27),
        (56, 56),
        (64, 64),
        (128, 128),
    ]
    assert invariance_sizes((56, 28))[:2] == [(20, 10), (28, 14)]
    assert invariance_sizes((1, 1)) == [(1, 1), (2, 2), (5, 5)]
    large = invariance_sizes((2000, 1000))
    assert (2000, 1000) in large and all(
        h * w <= 1 << 20 for h, w in large if (h, w) != (2000, 1000)
    )


def test_halving_is_the_mean():
    image = torch.tensor([[1.0, 3.0, 0.0, 0.0], [5.0, 7.0, 0.0, 8.0]])[None, None]
    assert halve(image).tolist() == [[[[4.0, 2.0]]]]


def test_stretched_images_lose_by_shrinking_alone(classifier, shards, data):
    def score(size):
        return score_stretched(
            classifier, classifier, real, real_batches(shards, data, "test", (8, 8), 200), size
        )

    real = extract_features(
        classifier, (images for images, _ in real_batches(shards, data, "test", (8, 8), 200))
    )
    native, large, small = (score(size) for size in ((8, 8), (32, 16), (2, 2)))
    assert (
        native["images"] == 200
        and native["frechet"] == pytest.approx(0, abs=1e-3)
        and native["precision"] == 1
    )
    assert native["accuracy"] >= 0.98 and large["accuracy"] >= 0.95
    assert native["frechet"] < large["frechet"] < small["frechet"] and small["accuracy"] < 0.6


def test_consistency_of_samples_is_that_of_the_same_seeds(sampler, classifier):
    pair = score_consistency(Samples(sampler, 25, 3), classifier, (8, 8))
    labels, seeds = torch.arange(25) % 10, torch.arange(3, 28)
    small, large = (sampler.sample(labels, seeds, size) for size in ((8, 8), (16, 16)))
    assert pair["psnr"] == pytest.approx(
        float(psnr(mse(F.avg_pool2d(large, 2), small)).mean()), abs=0.01
    )
    assert pair["same_class"] == float(
        (classifier.classify(small) == classifier.classify(large)).double().mean()
    )
    assert pair["samples"] == 25 and pair["first_seed"] == 3
    assert score_consistency(Samples(sampler, 2, 3), None, (8, 8))["same_class"] is None


def test_samples_stand_beside_stretched_real_images(sampler, classifier, shards, data, monkeypatch):
    monkeypatch.setattr(invariance, "_SIZES", ((28, 28), (42, 28)))
    found = measure_samples(Samples(sampler, 30, 2), classifier, classifier, shards, data)
    assert found["reference_images"] == 180 and list(found["sizes"]) == ["8x8", "12x8"]
    row = found["sizes"]["8x8"]
    assert row["samples"] == row["stretched"]["images"] == row["consistency"]["samples"] == 30
    images = to_float(load_images(shards, data.model_copy(update={"size": (8, 8)}), "test")[0])
    half, rest = images[0::2], images[1::2]
    chosen = rest[torch.arange(30) * len(rest) // 30]
    expected = score_stretched(
        classifier,
        classifier,
        extract_features(classifier, half.split(100)),
        iter([(chosen, torch.full((30,), -1))]),
        (8, 8),
    )
    assert expected["accuracy"] is None
    assert row["stretched"]["frechet"] == pytest.approx(expected["frechet"], rel=1e-3)
    assert row["stretched"]["frechet"] > 0.05  # other images than those that they are compared with
    assert (
        row["stretched"]["accuracy"] > 0.9 > row["accuracy"]
    )  # the samples are of a model that has hardly been trained


def test_as_many_samples_as_real_images_are_scored(sampler, classifier, shards, data, monkeypatch):
    monkeypatch.setattr(invariance, "_SIZES", ((28, 28),))
    found = measure_samples(Samples(sampler, 200, 2), classifier, classifier, shards, data)
    row = found["sizes"]["8x8"]
    assert row["samples"] == row["stretched"]["images"] == 179  # the other half of the test split
    assert "lowest" not in row


def test_reconstructions_by_size(sampler, classifier, shards, data):
    codec = replace(sampler.codec, bfloat16=False)
    found = measure_reconstructions(codec, shards, data, classifier, limit=30)
    images = next(iter(real_batches(shards, data, "test", (8, 8), 30)))[0]
    latents = codec.encode(images)
    row = found["sizes"]["11x7"]
    decoded, truth, larger = (
        codec.decode(latents, (11, 7), native=(8, 8)),
        resize(images, (11, 7)),
        codec.decode(latents, (22, 14), native=(8, 8)),
    )
    assert row["images"] == 30 and row["mse"] == pytest.approx(
        float(mse(decoded, truth).mean()), rel=1e-3
    )
    assert row["psnr"] == pytest.approx(float(psnr(mse(decoded, truth)).mean()), abs=0.01)
    assert row["ssim"] == pytest.approx(float(ssim(decoded, truth).mean()), rel=1e-3)
    assert row["consistency"] == pytest.approx(
        float(psnr(mse(F.avg_pool2d(larger, 2), decoded)).mean()), abs=0.01
    )
    assert row["frechet"] > 0
    half = found["half_to_double"]
    wide = codec.decode(codec.encode(resize(images, (4, 4)), (8, 8)), (16, 16), native=(8, 8))
    assert half["mse"] == pytest.approx(float(mse(wide, resize(images, (16, 16))).mean()), rel=1e-3)
    assert half["relative"] == pytest.approx(half["mse"] / found["sizes"]["8x8"]["mse"], rel=1e-3)
    assert measure_reconstructions(codec, shards, data, limit=2)["sizes"]["8x8"]["frechet"] is None
