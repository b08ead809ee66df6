"""Metrics against what analysis says of them."""

import pytest
import torch
from scipy.linalg import sqrtm

from r2id.evaluation.metrics import class_accuracy, frechet_distance, mse, psnr


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
    one, other = (torch.randn(80, 5, generator=generator) @ torch.randn(5, 5, generator=generator) for _ in range(2))
    first, second = torch.cov(one.double().T), torch.cov(other.double().T)
    expected = ((one.double().mean(0) - other.double().mean(0)).square().sum() + first.trace() + second.trace()
                - 2 * sqrtm((first @ second).numpy()).real.trace())
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
    assert class_accuracy(torch.tensor([0, 0, 2, 1]), torch.tensor([0, 0, 0, 1]), 3) == [pytest.approx(2 / 3), 1.0, None]
