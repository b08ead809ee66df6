"""Features of whole images and of windows, and their comparison."""

from types import SimpleNamespace

import pytest
import torch

from r2id.errors import WorkError
from r2id.evaluation.metrics import frechet_distance
from r2id.evaluation.reference import (
    ImageFeatures,
    compare_features,
    cut_windows,
    extract_features,
    frechet_spread,
    real_batches,
    window_part,
)


def test_windows_are_cut_at_one_place_of_a_picture_at_every_size():
    ramp = torch.arange(40.0).reshape(1, 1, 1, 40).expand(300, 1, 40, 40)
    images = torch.cat([ramp, ramp.transpose(2, 3)], 1)
    windows = cut_windows(images)
    assert windows.shape == (300, 2, 20, 20)
    left, top = windows[:, 0, 0, 0], windows[:, 1, 0, 0]
    torch.testing.assert_close(windows[:, 0, 7], left[:, None] + torch.arange(20.0))
    torch.testing.assert_close(windows[:, 1, :, 3], top[:, None] + torch.arange(20.0))
    assert (left.min(), left.max(), top.min(), top.max()) == (
        0,
        20,
        0,
        20,
    )  # all places, edges included
    half = cut_windows(images[:, :, ::2, ::2])
    assert half.shape == (300, 2, 10, 10)
    assert (half[:, 0, 0, 0] - left).abs().max() <= 2 and (half[:, 1, 0, 0] - top).abs().max() <= 2
    assert cut_windows(images[7:9], 7).equal(windows[7:9])
    assert cut_windows(torch.zeros(2, 1, 5, 1)).shape == (2, 1, 3, 1)


def test_windows_of_large_images_are_pixels_as_they_are():
    assert window_part((32, 32), (32, 32)) == (0.5, 0.5)
    part = window_part((109, 89), (32, 40))
    assert part == (32 / 109, 40 / 89)
    images = torch.rand(3, 1, 109, 89)
    assert cut_windows(images, 0, part).shape == (3, 1, 32, 40)
    assert cut_windows(torch.zeros(3, 1, 218, 178), 0, part).shape == (3, 1, 64, 80)
    assert cut_windows(torch.zeros(1, 1, 1, 1), 0, part).shape == (1, 1, 1, 1)


def test_spectra_are_compared_at_one_size():
    extractor = SimpleNamespace(features=lambda images: images.mean((1, 3))[:, :2])
    images = torch.randn(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    one, other = (extract_features(extractor, [part]) for part in images.split(20))
    blurred = torch.nn.functional.avg_pool2d(images[:20], 3, 1, 1)
    near, far = (
        compare_features(some, other)["spectrum"]
        for some in (one, extract_features(extractor, blurred.split(7)))
    )
    assert near < 0.3 and far > 1
    smaller = extract_features(extractor, [images[:20, :, :12]])
    assert compare_features(smaller, other)["spectrum"] is None


def test_batches_do_not_matter():
    extractor = SimpleNamespace(features=lambda images: images.mean((1, 3)))
    images = torch.rand(20, 3, 6, 6)
    whole = extract_features(extractor, [images])
    parts = extract_features(extractor, images.split(7))
    assert whole.whole.equal(parts.whole) and whole.windows.equal(parts.windows)
    assert whole.whole.shape == (20, 6) and whole.windows.shape == (20, 3)


def test_sets_are_compared_whole_and_by_windows():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    figures = compare_features(ImageFeatures(x, x + 2), ImageFeatures(x, x))
    assert figures["frechet"] == pytest.approx(0, abs=1e-6) and figures[
        "patch_frechet"
    ] == pytest.approx(12)
    assert figures["precision"] == figures["recall"] == 1 and abs(figures["kid"]) < 0.05
    more = torch.cat([x, x + 100])
    figures = compare_features(ImageFeatures(x, x), ImageFeatures(more, more))
    assert figures["frechet"] == pytest.approx(frechet_distance(x, more))
    assert figures["recall"] == pytest.approx(0.5, abs=0.1)  # of 50 of the 100, evenly spaced
    few = ImageFeatures(x[:3], x[:3])
    assert compare_features(few, few)["precision"] is None and compare_features(few, few)[
        "frechet"
    ] == pytest.approx(0, abs=1e-6)
    assert set(compare_features(ImageFeatures(x[:1], x[:1]), few).values()) == {None}


@pytest.mark.parametrize("times", [1, 2, 5])
def test_samples_that_take_classes_in_turn_keep_them_all_when_thinned(times):
    """Perfect samples of ten separate classes, ``times`` as many as there are real images."""
    generator = torch.Generator().manual_seed(0)
    places = 8 * torch.randn(10, 16, generator=generator)

    def draw(labels):
        x = places[labels] + torch.randn(len(labels), 16, generator=generator)
        return ImageFeatures(x, x)

    real = draw(torch.randint(0, 10, (1000,), generator=generator))
    samples = draw(torch.arange(1000 * times) % 10)
    figures = compare_features(samples, real)
    assert figures["recall"] > 0.7 and figures["precision"] > 0.7
    assert compare_features(samples, real) == figures


def test_features_that_are_not_finite_are_named():
    def features(images):
        return (1 / images).mean((2, 3))

    images = torch.ones(8, 1, 6, 6)
    images[5, 0, 0, 0] = 0
    with pytest.raises(WorkError, match=r"real image 5: its features are not finite"):
        extract_features(SimpleNamespace(features=features), images.split(3))
    with pytest.raises(WorkError, match=r"seed 15:"):
        extract_features(
            SimpleNamespace(features=features), [images], name=lambda n: f"seed {10 + n}"
        )


def test_the_spread_of_a_distance_is_about_that_of_drawing_anew():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 4, generator=generator)
    real = ImageFeatures(x, x)
    sets = [ImageFeatures(y, y) for y in torch.randn(40, 100, 4, generator=generator) + 0.5]
    distances = torch.tensor([compare_features(some, real)["frechet"] for some in sets])
    spreads = torch.tensor([frechet_spread(some, real) for some in sets])
    # Half a difference of two normal numbers, each of twice the variance.
    assert float(spreads.square().mean().sqrt()) == pytest.approx(float(distances.std()), rel=0.3)
    assert frechet_spread(sets[0], real) == spreads[0]
    few = ImageFeatures(x[:3], x[:3])
    assert frechet_spread(few, real) is None


def test_real_images_at_a_size(shards, data):
    images, labels = (
        torch.cat(part) for part in zip(*real_batches(shards, data, "test", (5, 9)), strict=True)
    )
    assert images.shape == (359, 1, 5, 9) and labels.tolist() == shards.split("test").label.tolist()
    some = list(real_batches(shards, data, "test", (5, 9), 2, [1, 3, 5, 7]))
    assert some[0][0].equal(images[[1, 5]])
