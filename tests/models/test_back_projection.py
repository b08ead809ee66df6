"""A picture in smaller pixels, averaged down, is the picture."""

import pytest
import torch
import torch.nn.functional as F

from r2id.config import RiaeConfig
from r2id.images import resize
from r2id.models.back_projection import back_project, find_residuals, sampled_size
from r2id.models.riae import RIAE


def decoder_of_points() -> RIAE:
    """An RIAE of one value per pixel, whose network has something to say between points."""
    torch.manual_seed(0)
    config = RiaeConfig(
        latent_channels=4, downsample=2, width=8, encoder_blocks=0, decoder_blocks=0, features=4
    )
    model = RIAE(config, 1)
    torch.nn.init.normal_(model.fine.between.to_colour.weight, std=0.2)
    return model.eval()


def drawn(model: RIAE, size: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one random picture of 12×10 points at its own size and at another one."""
    latents = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    return tuple(model.decode(latents, out, native=(12, 10)) for out in ((12, 10), size))


@pytest.mark.parametrize(("down", "across"), [(2, 2), (4, 4), (3, 1), (1, 2), (7, 5)])
def test_means_of_smaller_pixels_are_the_colours_of_points(down, across):
    model = decoder_of_points()
    points, larger = drawn(model, (12 * down, 10 * across))
    assert points.std() > 0.2
    wanted = points.clamp(-1, 1)
    error = (F.avg_pool2d(larger.clamp(-1, 1), (down, across)) - wanted).square().mean()
    without = F.avg_pool2d(resize(wanted, larger.shape[2:]).clamp(-1, 1), (down, across))
    assert error < 0.15 * (without - wanted).square().mean()
    assert larger.std() > 0.2


def test_an_axis_of_fewer_pixels_is_averaged_too():
    model = decoder_of_points()
    points, larger = drawn(model, (24, 5))
    wanted = resize(points, (12, 5)).clamp(-1, 1)
    error = (F.avg_pool2d(larger.clamp(-1, 1), (2, 1)) - wanted).square().mean()
    without = F.avg_pool2d(resize(points, (24, 5)).clamp(-1, 1), (2, 1)) - wanted
    assert error < 0.15 * without.square().mean()


def test_sizes_of_no_smaller_pixels_are_as_they_were():
    model = decoder_of_points()
    points, same = drawn(model, (12, 10))
    assert torch.equal(points, same)
    smaller = drawn(model, (6, 10))[1]
    torch.testing.assert_close(smaller, resize(points, (6, 10)), atol=1e-5, rtol=0)


def test_colours_that_cannot_be_shown_count_as_those_that_can():
    """Points beyond [−1, 1] are shown clipped, and so their means are."""
    model = decoder_of_points()
    latents = 6 * torch.randn(1, 4, 6, 5)
    points, larger = (model.decode(latents, out, native=(12, 10)) for out in ((12, 10), (24, 20)))
    assert (points.abs() > 1).float().mean() > 0.3
    means = F.avg_pool2d(larger.clamp(-1, 1), 2)
    assert (means - points.clamp(-1, 1)).abs().mean() < 0.1
    assert (means - resize(larger, (12, 10))).abs().max() > 0.1


def test_means_are_taken_of_few_pixels_however_large_a_picture_is():
    assert sampled_size((12, 10), (24, 20)) == (24, 20)
    assert sampled_size((12, 10), (4096, 5)) == (48, 5)


def test_autocast_changes_nothing():
    colours = torch.rand(1, 1, 6, 5) * 2 - 1
    native, size, whole = (6, 5), (24, 15), (slice(None), slice(None))

    def corrected():
        larger = resize(colours, size)
        residuals = find_residuals(larger, colours, native, size, whole, (0, 0))
        return back_project(larger, residuals, native, size, whole)

    plain = corrected()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(corrected(), plain)
