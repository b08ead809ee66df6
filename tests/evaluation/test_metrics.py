"""Metrics against what analysis says of them."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from r2id.evaluation.metrics import (
    class_accuracy,
    frechet_distance,
    kernel_distance,
    mse,
    nearest,
    precision_and_recall,
    spectral_distance,
    ssim,
)
from r2id.images import psnr
from r2id.spectra import radial_spectrum


def test_error_and_psnr_of_a_known_difference():
    truth = torch.zeros(2, 3, 4, 5)
    images = truth + torch.tensor([0.2, 1.0]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(mse(images, truth), torch.tensor([0.04, 1.0], dtype=torch.float64))
    torch.testing.assert_close(psnr(mse(images, truth)).float(), torch.tensor([20.0, 6.0206]))
    assert psnr(mse(truth, truth)).isfinite().all()


def gaussian(count: int, dim: int, seed: int) -> torch.Tensor:
    """Features whose sample mean is exactly 0 and sample covariance exactly the identity."""
    x = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T


def test_frechet_distance_of_a_shift_is_its_square():
    x, shift = gaussian(200, 6, 0), torch.arange(6.0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(float(shift.square().sum()))


def test_frechet_distance_of_scales_is_that_of_standard_deviations():
    one, other = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([3.0, 2.0, 0.0])
    distance = frechet_distance(gaussian(100, 3, 1) * one, gaussian(300, 3, 2) * other)
    assert distance == pytest.approx(float((one - other).square().sum()))


def test_frechet_distance_equals_the_formula_with_a_matrix_root():
    generator = torch.Generator().manual_seed(3)
    one, other = (
        torch.randn(80, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
        for _ in range(2)
    )
    first, second = torch.cov(one.double().T), torch.cov(other.double().T)
    expected = (
        (one.double().mean(0) - other.double().mean(0)).square().sum()
        + first.trace()
        + second.trace()
        - 2 * sqrtm((first @ second).numpy()).real.trace()
    )
    assert frechet_distance(one, other) == pytest.approx(float(expected), rel=1e-6)
    assert frechet_distance(other, one) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_of_fewer_images_than_features():
    x = gaussian(200, 40, 4)
    assert frechet_distance(x[:7], x[:7]) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(x[:7], x) > 0
    assert frechet_distance(x[:, :1], x[:, :1] + 2) == pytest.approx(4)
    with pytest.raises(ValueError, match="1 and 200 features"):
        frechet_distance(x[:1], x)


def test_class_accuracy_leaves_out_classes_without_images():
    assert class_accuracy(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 0, 1]), 3) == [
        pytest.approx(2 / 3),
        1.0,
        None,
    ]


def slow_ssim(image: np.ndarray, truth: np.ndarray, side: int) -> float:
    """Of two [H, W] on [0, 2], place by place, as the paper writes it."""
    at = np.arange(side) - side // 2
    window = np.exp(-(at[:, None] ** 2 + at[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(image.shape[0] - side + 1):
        for left in range(image.shape[1] - side + 1):
            x, y = (picture[top : top + side, left : left + side] for picture in (image, truth))
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            both = (window * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + 0.02**2)
                * (2 * both + 0.06**2)
                / ((mean_x**2 + mean_y**2 + 0.02**2) * (var_x + var_y + 0.06**2))
            )
    return float(np.mean(values))


@pytest.mark.parametrize(("size", "side"), [((14, 17), 11), ((8, 8), 7), ((9, 9), 9), ((1, 1), 1)])
def test_ssim_is_the_papers(size, side):
    generator = np.random.default_rng(0)
    images, truth = (generator.uniform(-1, 1, (2, 3, *size)) for _ in range(2))
    truth = 0.7 * images + 0.3 * truth
    expected = [
        np.mean([slow_ssim(images[n, c] + 1, truth[n, c] + 1, side) for c in range(3)])
        for n in range(2)
    ]
    np.testing.assert_allclose(
        ssim(torch.from_numpy(images), torch.from_numpy(truth)), expected, rtol=1e-9
    )


def test_ssim_is_scikit_images():
    measure = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(1)
    image, truth = generator.uniform(-1, 1, (2, 20, 31))
    expected = measure.structural_similarity(
        image + 1,
        truth + 1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=2,
    )
    assert float(
        ssim(torch.from_numpy(image)[None, None], torch.from_numpy(truth)[None, None])
    ) == pytest.approx(expected)


def test_ssim_of_what_is_known():
    x = torch.rand(2, 1, 12, 13) * 2 - 1
    torch.testing.assert_close(ssim(x, x), torch.ones(2, dtype=torch.float64))
    c1 = 0.02**2  # of flat images the means alone count
    flat = ssim(torch.full((1, 1, 12, 12), 0.5), torch.full((1, 1, 12, 12), -0.25))
    assert float(flat) == pytest.approx((2 * 1.5 * 0.75 + c1) / (1.5**2 + 0.75**2 + c1))
    assert ssim(x, -x).max() < 0


def test_precision_and_recall_of_parts_and_of_strangers():
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    assert precision_and_recall(x, x) == (1.0, 1.0)
    assert precision_and_recall(x, x + 100) == (0.0, 0.0)
    both = torch.cat([x[:150], x[150:] + 100])  # real images are of two kinds, and samples of one
    precision, recall = precision_and_recall(torch.cat([x[:150], x[:150] + 1e-3]), both)
    assert precision == 1.0 and recall == pytest.approx(0.5, abs=0.05)
    precision, recall = precision_and_recall(both, x[:150])  # and the reverse
    assert precision == pytest.approx(0.5, abs=0.05) and recall == 1.0


def test_the_third_neighbour_is_the_ball():
    real = torch.tensor([[0.0], [1.0], [2.0], [4.0]])  # radii 4, 3, 2, 4
    precision, recall = precision_and_recall(torch.tensor([[-3.9], [-4.1], [7.9], [8.1]]), real)
    assert (precision, recall) == (0.5, 1.0)
    with pytest.raises(ValueError, match="3 and 4 features"):
        precision_and_recall(real[:3], real)


def test_duplicates_far_from_the_origin_are_at_distance_0():
    """So they lie within their own balls, whose radius is 0."""
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double() + 1e6
    four = x.repeat(4, 1)
    assert (nearest(x, four, 4)[0] == 0).all()
    assert precision_and_recall(x, four)[0] == 1.0


def slow_precision_and_recall(samples: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """With every distance computed from differences."""

    def covered(points: torch.Tensor, centres: torch.Tensor) -> float:
        radii = slow_distances(centres, centres).kthvalue(4, dim=1).values
        return float((slow_distances(points, centres) <= radii).any(1).double().mean())

    return covered(samples, real), covered(real, samples)


def slow_distances(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")


def feature_sets() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Two sets each that are hard to compare: with duplicates, ties, offsets, strays."""
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 600, 20, generator=generator)
    lattice = torch.randint(0, 3, (2, 600, 4), generator=generator).float()
    twins, copies = one.clone(), torch.cat([one[:300], other[:300]])
    twins[100:200] = twins[:100]
    stray = one.clone()
    stray[7] *= 1e9
    return {
        "plain": (one, other),
        "copies": (copies, one),
        "copies far from 0": (copies + 1e6, one + 1e6),
        "twins in float64 far from 0": (twins.double() + 1e6, one.double() + 1e6),
        "ties": (lattice[0], lattice[1]),
        "ties far from 0": (lattice[0] + 1e6, lattice[1] + 1e6),
        "all alike": (one[:1].expand(300, -1), one[:1].expand(300, -1)),
        "one stray": (stray, other),
    }


@pytest.mark.parametrize("name", feature_sets())
def test_precision_recall_and_neighbours_are_those_of_exact_distances(name):
    one, other = feature_sets()[name]
    assert precision_and_recall(one, other) == slow_precision_and_recall(one, other)
    distances, indices = nearest(one, other, 3)
    every = slow_distances(one, other)
    assert distances.equal(every.topk(3, largest=False).values)
    assert every.gather(1, indices).equal(distances)
    assert all(len(set(row)) == 3 for row in indices.tolist())


def test_distances_of_what_is_no_number_are_none():
    x = torch.randn(50, 3)
    x[7, 1] = float("nan")
    assert np.isnan(frechet_distance(x, torch.randn(60, 3)))


def test_kernel_distance_by_hand():
    one, other = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    # Of different ones within each set: (2/2 + 1)³ = 8 and (0 + 1)³ = 1. Between the sets, x·y is
    # 0, 2, 0, 0: the mean of 1, 8, 1, 1 is 2.75.
    assert kernel_distance(one, other) == pytest.approx(8 + 1 - 2 * 2.75)
    with pytest.raises(ValueError, match="1 and 2 features"):
        kernel_distance(one[:1], other)


def test_kernel_distance_is_unbiased():
    """Of two sets of one distribution it is 0 on average, however few they are."""
    x = torch.randn(400, 10, 3, generator=torch.Generator().manual_seed(0))
    found = torch.tensor([kernel_distance(part[:5], part[5:]) for part in x])
    assert abs(found.mean()) < 3 * found.std() / 20 and (found < 0).any()
    more = torch.randn(2500, 3, generator=torch.Generator().manual_seed(1))
    assert kernel_distance(more[:1200], more[1200:] + 1) > 10 * abs(found.mean())


def test_spectrum_of_a_wave_and_of_noise():
    place = torch.arange(32.0)
    wave = torch.sin(2 * torch.pi * place * 8 / 32).expand(1, 2, 32, 32)  # a quarter per pixel
    for images in (wave, wave.transpose(2, 3)):
        power = radial_spectrum(images).mean(0)
        assert len(power) == 8 and power.argmax() == 6  # rings begin at 1/32 · 2^(k/2)
    noise = torch.randn(200, 1, 24, 40, generator=torch.Generator().manual_seed(0))
    power = radial_spectrum(noise).mean(0)
    assert power[1:].std() < 0.05 * power.mean()  # white, whatever the aspect ratio
    torch.testing.assert_close(radial_spectrum(3 * noise + 0.5).mean(0), 9 * power)
    # Two rings in each octave below half a cycle per pixel, rounded: log₂(10/2)·2 = 4.6.
    assert [radial_spectrum(noise[..., :side, :side]).shape[1] for side in (2, 3, 10, 12)] == [
        *(0, 1),
        *(5, 5),
    ]


def test_spectrum_of_3x3_pixels_by_hand():
    """One ring holds every frequency but 0."""
    image, window = np.random.default_rng(0).normal(size=(3, 3)), np.hanning(5)[1:-1]
    power = np.abs(np.fft.fft2((image - image.mean()) * np.outer(window, window))) ** 2
    found = radial_spectrum(torch.from_numpy(image)[None, None])[0]
    assert found.tolist() == pytest.approx([(power.sum() - power[0, 0]) / 8])


def test_spectral_distance_says_blur():
    noise = torch.randn(300, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    one, other = images.split(150)
    blurred = torch.nn.functional.avg_pool2d(one, 3, 1, 1)
    twice = torch.nn.functional.avg_pool2d(blurred, 3, 1, 1)
    distances = [
        spectral_distance(radial_spectrum(some).mean(0), radial_spectrum(other).mean(0))
        for some in (one, blurred, twice)
    ]
    assert distances[0] < 0.05 < 0.5 < distances[1] < distances[2]
    power = torch.tensor([1.0, 5.0, 0.0])
    assert spectral_distance(power, 0.5 * power) == pytest.approx(2 * np.log(2) / 3)
