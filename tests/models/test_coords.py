"""Coordinates: analytic identities at several sizes."""

import pytest
import torch

from r2id.models import coords


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (7, 5), (64, 1)])
def test_centres_are_inside_and_symmetric(grid):
    at = coords.grid_coordinates(grid)
    assert at.shape == (grid[0] * grid[1], 4)
    assert at[:, :2].abs().max() < 0.5
    torch.testing.assert_close(at, -at.flip(0))


def test_a_cell_is_the_mean_of_its_quarters():
    fine = coords.grid_coordinates((8, 12)).view(4, 2, 6, 2, 4).mean(dim=(1, 3)).reshape(-1, 4)
    torch.testing.assert_close(fine, coords.grid_coordinates((4, 6)), atol=1e-6, rtol=0)


def test_relative_coordinates_keep_shapes():
    at = coords.grid_coordinates((2, 4))
    # One column to the right and one row down are the same distance, in relative coordinates only.
    right, down = at[1] - at[0], at[4] - at[0]
    assert right[2] == pytest.approx(down[3]) and right[0] != pytest.approx(down[1])
    assert at[:, 2].max() == pytest.approx(3 / 8) and at[:, 3].max() == pytest.approx(1 / 8)


def test_first_row_runs_along_x():
    assert coords.grid_coordinates((2, 3))[:3, 0].tolist() == pytest.approx([-1 / 3, 0, 1 / 3])


def test_jitter_is_one_displacement_in_both_systems():
    grid = (4, 8)
    at, noise = coords.grid_coordinates(grid), torch.randn(3, 32, 2)
    moved = coords.displace(at, noise, grid) - at
    torch.testing.assert_close(moved[..., 0], noise[..., 0] / 16)
    torch.testing.assert_close(moved[..., 1], noise[..., 1] / 8)
    torch.testing.assert_close(moved[..., 2:], noise / 16)  # m = 8 on both axes


def test_fourier_features_are_normalised_per_system_and_float32():
    with torch.autocast("cpu", torch.bfloat16):
        features = coords.fourier_features(coords.grid_coordinates((5, 6)), (-3, 7))
    assert (
        features.shape == (30, 88) == (30, coords.fourier_dim((-3, 7)))
        and features.dtype == torch.float32
    )
    for half in features.split(44, dim=-1):
        torch.testing.assert_close(half.mean(-1), torch.zeros(30), atol=1e-5, rtol=0)
        torch.testing.assert_close(half.var(-1, unbiased=False), torch.ones(30), atol=1e-3, rtol=0)


def test_fourier_features_tell_neighbours_of_1024_apart():
    features = coords.fourier_features(coords.grid_coordinates((1, 1024)), (-3, 7))
    assert (features[1:] - features[:-1]).norm(dim=-1).min() > 0.1


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (5, 7)])
def test_phase_is_the_same_in_every_cell(grid):
    """The centres of all cells have the phase of the middle of a period: sin π = 0, cos π = −1, sin
    2π = 0, cos 2π = 1."""
    phase = coords.cell_phase(coords.grid_coordinates(grid), grid)
    expected = torch.tensor([0.0, 0, 0, 0, -1, -1, 1, 1]).expand_as(phase)
    torch.testing.assert_close(phase, expected, atol=1e-5, rtol=0)


def test_sampled_colours_are_the_pixels_at_their_centres():
    image = torch.randn(2, 3, 5, 7)
    colours = coords.sample_image(image, coords.grid_coordinates((5, 7)).unsqueeze(0))
    torch.testing.assert_close(colours, image.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-4)


def test_sampled_colours_follow_a_ramp():
    """Away from the border, bicubic interpolation follows a linear function to a twentieth of a
    pixel."""
    ramp = coords.grid_coordinates((16, 16))[:, 0].view(1, 1, 16, 16)
    at = torch.tensor([[[0.1234, -0.2, 0.0, 0.0], [-0.3, 0.05, 0.0, 0.0]]])
    torch.testing.assert_close(
        coords.sample_image(ramp, at).squeeze(), at[0, :, 0], atol=0.05 / 16, rtol=0
    )
