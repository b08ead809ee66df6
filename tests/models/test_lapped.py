"""The lapped transform: nothing is lost, flat areas stay, and neighbouring cells join."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from r2id.models import lapped
from r2id.models.cells import to_cells, to_points
from r2id.models.lapped import lap, unlap
from r2id.training.pca import fit_pca


def smooth(count, size, seed=0):
    """Pictures [count, 1, size, size] that are smooth over several pixels, as photos are."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 1, size + 12, size + 12, generator=generator)
    for _ in range(3):
        noise = F.avg_pool2d(noise, 5, stride=1)
    return noise / noise.std()


@pytest.mark.parametrize("cell", [1, 2, 3, 4, 7, 8, 16])
@pytest.mark.parametrize("cells", [(1, 1), (1, 5), (3, 2)])
def test_nothing_is_lost(cell, cells):
    points = torch.rand(2, 3, cells[0] * cell, cells[1] * cell)
    for there, back in ((lap, unlap), (unlap, lap)):
        torch.testing.assert_close(back(there(points, cell), cell), points, atol=1e-5, rtol=0)


def test_it_is_the_published_filter():
    """Of Tran, Liang & Tu 2003, written out for an axis with four points in a cell."""
    scale = lapped._ENLARGED
    second = np.array([[1, 1], [1, -1]]) / math.sqrt(2)
    angles = math.pi / 4 * np.outer([0.5, 1.5], [0.5, 1.5]) * 2
    fourth = np.cos(angles)
    flip, same = np.eye(2)[::-1], np.eye(2)
    inner = flip @ second.T @ np.diag([scale, 1]) @ fourth @ flip
    butterfly = np.block([[same, flip], [flip, -same]])
    expected = butterfly @ np.block([[same, 0 * same], [0 * same, inner]]) @ butterfly / 2
    row = torch.arange(12.0).square().view(1, 1, 1, 12).expand(1, 1, 4, 12)
    mixed = lap(row, 4)[0, 0, 0]
    np.testing.assert_allclose(mixed[2:6], expected @ row[0, 0, 0, 2:6].numpy(), rtol=1e-5)
    np.testing.assert_allclose(mixed[6:10], expected @ row[0, 0, 0, 6:10].numpy(), rtol=1e-5)
    assert torch.equal(mixed[:2], row[0, 0, 0, :2]) and torch.equal(mixed[10:], row[0, 0, 0, 10:])


@pytest.mark.parametrize("cell", [2, 5, 8])
def test_flat_pictures_and_outer_borders_stay(cell):
    flat = torch.full((1, 2, 3 * cell, 2 * cell), 0.7)
    torch.testing.assert_close(lap(flat, cell), flat, atol=1e-6, rtol=0)
    generator = torch.Generator().manual_seed(0)
    points, half = torch.rand(1, 1, 4 * cell, 4 * cell, generator=generator), cell // 2
    mixed = lap(points, cell)
    assert torch.equal(mixed[..., :half, :half], points[..., :half, :half])
    assert not torch.isclose(mixed[..., cell - 1, :half], points[..., cell - 1, :half]).any()


@pytest.mark.parametrize("cell", [2, 4, 7, 16])
def test_it_is_orthogonal_but_for_what_is_enlarged(cell, monkeypatch):
    def strengths():
        return torch.linalg.svdvals(lapped._mixing.__wrapped__(cell, False, torch.device("cpu")))

    values = strengths()
    assert values[0] == pytest.approx(lapped._ENLARGED) and values[1:] == pytest.approx(1)
    monkeypatch.setattr(lapped, "_ENLARGED", 1.0)
    assert strengths() == pytest.approx(1)


def test_it_is_float32_under_autocast():
    points = torch.rand(1, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = lap(points, 4)
    assert torch.equal(mixed, lap(points, 4))


def coded(images, held_out, components, lapped, noise):
    """Code and decode with the PCA of ``images``, with noise on the codes."""
    cell = 8
    weights = fit_pca(images.split(100), cell, components, len(images) * 16, lapped)
    to_code, from_code = (
        (weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("to_code", "from_code")
    )
    points = lap(held_out, cell) if lapped else held_out
    codes = F.linear(to_cells(points, cell), *to_code)
    generator = torch.Generator().manual_seed(1)
    codes = codes + noise * torch.randn(codes.shape, generator=generator)
    points = to_points(F.linear(codes, *from_code), cell)
    return unlap(points, cell) if lapped else points


def border_step(images):
    """Mean step between neighbouring pixels across borders of cells, relative to those inside."""
    steps = rearrange(F.pad(images.diff(dim=3).abs(), (0, 1)), "b c h (w s) -> s (b c h w)", s=8)
    across = steps[-1].reshape(-1, 4)[:, :3]
    return float(across.mean() / steps[:-1].mean())


def test_a_lapped_analysis_has_less_error_than_cells_by_themselves():
    images, held_out = smooth(1000, 32), smooth(200, 32, seed=1)
    for noise in (0.0, 0.3):
        errors = [
            F.mse_loss(coded(images, held_out, 12, lapped, noise), held_out)
            for lapped in (False, True)
        ]
        assert errors[1] < 0.95 * errors[0]


def test_cells_of_disturbed_codes_join():
    images = smooth(1000, 32)
    apart, joined = (
        border_step(coded(images, images[:200], 12, lapped, noise=1.0)) for lapped in (False, True)
    )
    assert border_step(images[:200]) == pytest.approx(1, abs=0.05)
    assert apart > 2.5
    assert joined < 1.3
