"""Loss by time and by grid, and the scores of samples."""

import math

import pytest
import torch

from r2id.errors import WorkError
from r2id.evaluation import r2id as r2id_module
from r2id.evaluation.backbone import Backbone
from r2id.evaluation.errors_by_noise import loss_at
from r2id.evaluation.images import load_images
from r2id.evaluation.metrics import frechet_distance
from r2id.evaluation.r2id import (
    Samples,
    draw_samples,
    encode_test_images,
    measure_loss_by_grid,
    measure_loss_by_time,
    measure_real_baseline,
    score_samples,
)
from r2id.sampling.sampler import Sampler


def test_loss_against_time(sampler, shards, data):
    latents = encode_test_images(sampler, shards, data)
    assert sum(len(label) for _, label in latents) == 256
    measured = measure_loss_by_time(sampler, latents, (0.25, 0.75))
    assert measured["images"] == 256 and measured["time"] == [0.25, 0.75]
    assert set(measured["loss"]) == {"its class", "no class", "another class"}
    latent, label = latents[0]
    expected = loss_at(sampler, latent, label, 0.75, 0)
    alone = measure_loss_by_time(sampler, latents[:1], (0.75,))
    assert alone["loss"]["its class"] == [pytest.approx(float(expected.mean()), rel=1e-3)]
    assert measured == measure_loss_by_time(sampler, latents, (0.25, 0.75))


def test_the_classes_that_the_loss_is_measured_with(sampler, monkeypatch):
    given, labels = [], torch.arange(10)
    monkeypatch.setattr(
        r2id_module,
        "loss_at",
        lambda sampler, latent, condition, *where: given.append(condition) or torch.zeros(10),
    )
    latents = torch.zeros(10, sampler.codec.latent_channels, 4, 4)
    measured = measure_loss_by_time(sampler, [(latents, labels)], (0.5,))
    own, none, another = given
    assert list(measured["loss"]) == ["its class", "no class", "another class"]
    assert torch.equal(own, labels) and (none == -1).all()
    assert (another != labels).all() and set(another.tolist()) == set(range(10))


def test_the_loss_is_one_of_each_sample(sampler):
    latents = sampler.codec.encode(torch.zeros(5, 1, 8, 8))
    losses = loss_at(sampler, latents, torch.zeros(5, dtype=torch.int64), 0.5)
    assert losses.shape == (5,) and (losses > 0).all()


def test_loss_against_noise_of_three_grids(sampler, shards, data):
    measured = measure_loss_by_grid(sampler, shards, data, (0.25, 0.75))
    assert list(measured["grids"]) == ["2x2", "4x4", "8x8"] and measured["condition"] == "its class"
    own = measure_loss_by_time(sampler, encode_test_images(sampler, shards, data), (0.25, 0.75))[
        "loss"
    ]["its class"]
    assert measured["grids"]["4x4"]["loss"] == pytest.approx(own, rel=0.02)
    small, large = (torch.tensor(measured["grids"][name]["log_snr"]) for name in ("4x4", "8x8"))
    assert (small - large).tolist() == pytest.approx(
        [2 * math.log(2) * sampler.diffusion.shift_exponent] * 2, rel=1e-4
    )


def test_real_images_are_near_and_noise_is_far(classifier, shards, data):
    real, facts = measure_real_baseline(classifier, shards, data, (8, 8), 500)
    assert real.whole.shape == real.windows.shape == (359, Backbone.width)
    assert (facts["test_images"], facts["training_images"]) == (359, 500)
    assert (
        0 < facts["patch_frechet_of_training_images"] < 5
        and facts["precision_of_training_images"] > 0.8
    )
    noise = classifier.features(
        torch.rand(359, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )
    assert frechet_distance(noise, real.whole) > 20 * facts["frechet_of_training_images"]
    blurred = classifier.features(
        load_images(shards, data.model_copy(update={"size": (3, 3)}), "test")[0]
    )
    assert (
        facts["frechet_of_training_images"]
        < frechet_distance(blurred, real.whole)
        < frechet_distance(noise, real.whole)
    )


def test_scores_of_samples(sampler, classifier, shards, data):
    real, _ = measure_real_baseline(classifier, shards, data, (8, 8), 100)
    scores = score_samples(Samples(sampler, 130, 3), classifier, classifier, real, (12, 8))
    assert scores["size"] == [12, 8] and scores["samples"] == 130 and scores["classes"] == 10
    assert scores["grid"] == list(sampler.grid_for((12, 8)))
    assert scores["accuracy"] == pytest.approx(
        sum(scores["accuracy_per_class"]) / 10
    )  # 13 of each class
    images = draw_samples(Samples(sampler, 130, 3), [(12, 8)])[12, 8]
    features, classes = classifier.features(images), classifier.classify(images)
    assert scores["accuracy"] == pytest.approx(
        float((classes == torch.arange(130) % 10).double().mean()), abs=0.02
    )
    assert scores["frechet"] == pytest.approx(frechet_distance(features, real.whole), rel=0.05)
    scored = (
        classifier.probabilities(images).gather(1, (torch.arange(130) % 10).unsqueeze(1)).squeeze(1)
    )
    lowest = scores["lowest"]
    assert len(lowest) == 20 and [one["score"] for one in lowest] == sorted(
        one["score"] for one in lowest
    )
    assert lowest[0]["label"] == (lowest[0]["seed"] - 3) % 10
    assert lowest[0]["score"] == pytest.approx(float(scored.min()), rel=0.1)
    assert lowest[-1]["score"] == pytest.approx(float(scored.sort().values[19]), rel=0.1)
    assert 0 <= scores["precision"] <= 1 and scores["patch_frechet"] > 0
    unclassified = score_samples(Samples(sampler, 5, 3), None, classifier, real, (12, 8))
    assert (
        unclassified["accuracy"] is None
        and unclassified["lowest"] == []
        and unclassified["frechet"] > 0
    )


def test_one_sample_has_no_distance(sampler, classifier, shards, data):
    real, facts = measure_real_baseline(classifier, shards, data, (8, 8), 1)
    assert facts["frechet_of_training_images"] is None
    assert (
        score_samples(Samples(sampler, 1, 0), classifier, classifier, real, (8, 8))["frechet"]
        is None
    )


def test_the_same_seeds_at_every_size(sampler):
    drawn = draw_samples(Samples(sampler, 3, 7), [(8, 8), (5, 16)])
    assert {size: tuple(images.shape) for size, images in drawn.items()} == {
        (8, 8): (3, 1, 8, 8),
        (5, 16): (3, 1, 5, 16),
    }
    torch.testing.assert_close(
        drawn[8, 8], sampler.sample(torch.tensor([0, 3, 6]), torch.arange(7, 10), (8, 8))
    )


def test_fewer_samples_than_classes_are_of_evenly_spaced_ones(sampler):
    few = Samples(sampler, 5, 3)
    assert few.labels.tolist() == [0, 2, 4, 6, 8]
    assert few.first(2).labels.tolist() == [0, 2]
    assert few.first(7).labels.tolist() == [0, 2, 4, 6, 8, 0, 2]
    all_classes = Samples(sampler, 25, 3)
    assert all_classes.labels.equal(torch.arange(25) % 10)
    assert all_classes.first(5).labels.tolist() == [0, 1, 2, 3, 4]
    again = all_classes.with_count(5)
    assert again.labels.equal(few.labels) and again.seeds.equal(few.seeds)
    assert torch.equal(torch.cat(list(again.batches((8, 8)))), few_images(few))
    # Where the classes are the same, so are the latents.
    assert all_classes.with_count(12)._latents is all_classes._latents
    assert again._latents is not all_classes._latents


def few_images(samples):
    return samples.sampler.sample(samples.labels, samples.seeds, (8, 8))


def test_what_spoils_the_features_is_named(sampler, classifier, shards, data):
    real, _ = measure_real_baseline(classifier, shards, data, (8, 8), 100)

    class Spoilt:
        name, size = "spoilt", (8, 8)

        def features(self, images):
            return classifier.features(images) / 0

    with pytest.raises(WorkError, match=r"sample of seed 3 at 12x8, guidance 1\.1: its features"):
        score_samples(Samples(sampler, 4, 3), None, Spoilt(), real, (12, 8))


def test_fewer_and_more_samples_are_the_same_ones(sampler, monkeypatch):
    drawn = []
    plain = Sampler.latents
    monkeypatch.setattr(
        Sampler,
        "latents",
        lambda self, labels, seeds, grid, **asked: (
            drawn.extend(seeds.tolist()),
            plain(self, labels, seeds, grid, **asked),
        )[1],
    )
    samples = Samples(sampler, 12, 3)
    twelve, five, twenty = (
        torch.cat(list(some.batches((8, 8))))
        for some in (samples, samples.first(5), samples.first(20))
    )
    assert drawn == list(range(3, 23)), "each once"
    assert torch.equal(five, twelve[:5]) and torch.equal(twelve, twenty[:12]) and len(twenty) == 20
    assert torch.equal(twenty, sampler.sample(torch.arange(20) % 10, torch.arange(3, 23), (8, 8)))
