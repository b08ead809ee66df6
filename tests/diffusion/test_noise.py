"""The noise field: white on every grid, and the same picture on all of them."""

import pytest
import torch

from r2id.diffusion.noise import noise_field


@pytest.mark.parametrize("grid", [(1, 1), (7, 7), (9, 6), (5, 13)])
def test_white_and_standard(grid):
    noise = noise_field(torch.arange(1500), 1, grid).flatten(1)
    assert noise.shape == (1500, grid[0] * grid[1])
    covariance = noise.T @ noise / len(noise)
    assert (covariance - torch.eye(len(covariance))).abs().max() < 0.15
    assert noise.mean(0).abs().max() < 0.1


@pytest.mark.parametrize(
    ("coarse", "fine"), [((4, 4), (8, 8)), ((7, 7), (14, 14)), ((3, 5), (9, 10)), ((1, 1), (6, 4))]
)
def test_a_finer_grid_averages_to_the_coarser(coarse, fine):
    """Averages over cells, rescaled to variance 1, are the coarser grid's noise."""
    down, across = fine[0] // coarse[0], fine[1] // coarse[1]
    keys = torch.arange(50)
    blocks = (
        noise_field(keys, 3, fine).unflatten(2, (coarse[0], down)).unflatten(4, (coarse[1], across))
    )
    averaged = blocks.sum(dim=(3, 5)) / (down * across) ** 0.5
    exact = noise_field(keys, 3, coarse)
    correlation = torch.corrcoef(torch.stack([averaged.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.97


def test_a_sample_s_noise_is_its_own():
    keys = torch.tensor([3, 1, 4])
    together = noise_field(keys, 2, (5, 4))
    assert torch.equal(together[1], noise_field(keys[1:2], 2, (5, 4))[0])
    assert not torch.equal(together[0], together[1])


def test_resolution_of_the_field_changes_nothing_coarse():
    """A grid fine enough to need a finer field still averages to the small grid's noise."""
    keys = torch.arange(4)
    fine = noise_field(keys, 1, (128, 128)).unflatten(2, (8, 16)).unflatten(4, (8, 16))
    coarse = fine.sum(dim=(3, 5)) / 16
    torch.testing.assert_close(coarse, noise_field(keys, 1, (8, 8)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("grid", [(128, 128), (2, 300), (300, 2)])
def test_standard_on_grids_that_need_a_finer_field(grid):
    """Which the longer side decides: no cell is left without positions."""
    noise = noise_field(torch.arange(8), 1, grid)
    assert noise.isfinite().all() and float(noise.std()) == pytest.approx(1, abs=0.05)
