"""RIAE on a lattice: any size without loss, in parts as in whole, by what each place may see."""

import math
import re
from functools import partial
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from r2id.config import RiaeConfig
from r2id.config.models import lattice_grid
from r2id.errors import InputError
from r2id.images import resize
from r2id.models import cells as geometry
from r2id.models.cells import native_size, on_lattice
from r2id.models.riae import RIAE
from r2id.models.tracing import trace_peak

SMALL = RiaeConfig(
    latent_channels=5, downsample=4, width=16, encoder_blocks=1, decoder_blocks=1, features=4
)
ODD_SIZES = [(1, 1), (1, 500), (17, 3), (89, 109), (433, 769)]


def made(channels=1, **changes):
    """A model whose networks no longer correct by 0, as they do at the start."""
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update=changes), channels).eval()
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    return model


def lossless(channels=1, cell=4, lapped=False):
    """An untrained model whose latents are the colours at the points themselves."""
    torch.manual_seed(0)
    values = channels * cell**2
    changes = {"downsample": float(cell), "latent_channels": values, "lapped": lapped}
    model = RIAE(SMALL.model_copy(update=changes), channels).eval()
    for layer in (model.to_code, model.from_code):
        torch.nn.init.eye_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def picture(*shape):
    """Noise with a gradient over it, which no resizing leaves as it is."""
    noise = torch.rand(*shape, generator=torch.Generator().manual_seed(1))
    return noise + torch.linspace(-1, 0, shape[-1])


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_no_size_is_cropped_or_resampled(size, channels):
    model, image = lossless(channels), picture(1, channels, *size)
    latents = model.encode(image)
    assert latents.shape[2:] == (-(-size[0] // 4), -(-size[1] // 4)) == model.grid_for(size)
    assert torch.equal(model.decode(latents, size), image)
    model = lossless(channels, lapped=True)
    torch.testing.assert_close(model.decode(model.encode(image), size), image, atol=1e-5, rtol=0)


def test_latents_are_the_cells_of_points_and_borders_are_mirrored():
    image = picture(1, 2, 6, 9)
    latents = lossless(2).encode(image)
    whole = F.pad(image, (0, 3, 0, 2), mode="reflect")
    for row in range(2):
        for column in range(3):
            cell = whole[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.equal(latents[0, :, row, column], cell.flatten())


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (5, 3), (17, 33), (18, 31)])
def test_a_part_of_the_lattice_is_that_of_the_whole(size):
    image, cell = picture(1, 2, *size), 16
    whole = on_lattice(image, size, cell)
    height, width = (-(-side // cell) for side in size)
    assert whole.shape[2:] == (height * cell, width * cell)
    assert torch.equal(whole[:, :, : size[0], : size[1]], image)
    for row, column in product(range(height), range(width)):
        part = slice(row, row + 1), slice(column, column + 1)
        rows, columns = (slice(cell * side.start, cell * side.stop) for side in part)
        assert torch.equal(on_lattice(image, size, cell, part), whole[:, :, rows, columns])


@pytest.mark.parametrize("size", ODD_SIZES[:4])
@pytest.mark.parametrize("native", [(8, 8), (5, 31), (40, 3)])
def test_an_image_takes_the_place_of_one_of_native_size(size, native):
    model, image = lossless(), picture(2, 1, *size)
    latents = model.encode(image, native)
    assert latents.shape[2:] == lattice_grid(native, 4)
    expected = resize(image, native)
    torch.testing.assert_close(model.decode(latents, native), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("out", [(10, 13), (20, 26), (7, 9), (4, 40), (33, 5)])
def test_an_untrained_model_draws_other_sizes_by_bicubic_interpolation(out):
    model, image = lossless(3), picture(2, 3, 10, 13)
    drawn = model.parts.decoder.render(model.encode(image), out, native=(10, 13))
    torch.testing.assert_close(drawn, resize(image, out), atol=1e-5, rtol=0)


def test_a_network_corrects_what_lies_between_points_only_where_pixels_are_smaller():
    model = lossless()
    torch.nn.init.normal_(model.fine.between.to_colour.weight)
    image = picture(1, 1, 8, 8)
    latents = model.encode(image)
    for out, corrected in (
        ((8, 8), False),
        ((5, 8), False),
        ((3, 2), False),
        ((8, 9), True),
        ((16, 4), True),
    ):
        drawn = model.parts.decoder.render(latents, out, native=(8, 8))
        change = (drawn - resize(image, out)).abs().max()
        assert (change > 0.01) == corrected and (corrected or change < 1e-5), out


# Parts


SCALES = {
    "native": ((22, 13), (22, 13)),
    "larger": ((22, 13), (55, 33)),
    "slightly larger": ((22, 13), (23, 14)),
    "much larger": ((22, 13), (150, 61)),
    "smaller": ((22, 13), (9, 6)),
    "wider": ((22, 13), (12, 40)),
    "the whole lattice": ((24, 16), (31, 50)),
}


@pytest.mark.parametrize(("native", "size"), SCALES.values(), ids=SCALES.keys())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"downsample": 1.0, "decoder_blocks": 2},
        {"downsample": 2.0, "decoder_blocks": 0},
        {"features": 0},
        {"linear": False},
        {"lapped": False},
    ],
    ids=str,
)
def test_windows_and_pieces_make_the_whole(changes, native, size, monkeypatch):
    model = made(2, **changes)
    latents = torch.randn(2, 5, *model.grid_for(native))
    whole = model.decode(latents, size, native=native)
    assert whole.std() > 0.01 and whole.shape == (2, 2, *size)
    monkeypatch.setattr(geometry, "_PIECE", 2 * 5**2)
    torch.testing.assert_close(
        model.decode(latents, size, native=native), whole, atol=1e-5, rtol=1e-5
    )
    ys, xs = sorted({0, 1, size[0] // 2, size[0]}), sorted({0, size[1] // 3, size[1]})
    rows = [
        torch.cat(
            [model.decode(latents, size, (y0, x0, y1, x1), native) for x0, x1 in pairwise(xs)],
            dim=3,
        )
        for y0, y1 in pairwise(ys)
    ]
    torch.testing.assert_close(torch.cat(rows, dim=2), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "native"),
    [((45, 30), (45, 30)), ((45, 30), (23, 77)), ((45, 30), (90, 60)), ((3, 70), (3, 70))],
)
@pytest.mark.parametrize(
    "changes", [{}, {"downsample": 1.0, "encoder_blocks": 2}, {"lapped": False}], ids=str
)
def test_encoding_in_pieces_changes_nothing(changes, size, native, monkeypatch):
    model, images = made(2, **changes), picture(3, 2, *size)
    whole = model.encode(images, native)
    assert whole.std() > 0.01
    monkeypatch.setattr(geometry, "_PIECE", 3 * 12**2)
    torch.testing.assert_close(model.encode(images, native), whole, atol=1e-5, rtol=1e-5)


def test_a_picture_does_not_depend_on_its_batch():
    model, images = made(), picture(3, 1, 12, 9)
    together, alone = (model.decode(model.encode(some), (15, 15)) for some in (images, images[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lapped", [0, 1])
def test_a_change_reaches_no_further_than_the_layers(lapped):
    """Of one pixel: the cells that the encoder's layers reach. Of one cell: as many, and one more
    for the layers on points. Half a cell more where cells are lapped."""
    model, image = made(lapped=bool(lapped)), torch.zeros(1, 1, 4, 160)
    changed = image.clone()
    changed[..., 80] = 1
    moved = (model.encode(changed) - model.encode(image)).abs().amax(dim=(0, 1, 2)) > 1e-7
    assert moved.nonzero().flatten().tolist() == list(range(20 - 3 - lapped, 20 + 4))
    latents = torch.zeros(1, 5, 1, 40)
    other = latents.clone()
    other[..., 20] = 1
    drawn = (model.decode(other, (4, 160)) - model.decode(latents, (4, 160))).abs() > 1e-7
    places = drawn.any(dim=2).nonzero()[:, -1]
    assert 4 * (20 - 4) - 2 * lapped <= places.min() < 4 * (20 - 2)
    assert 4 * (20 + 3) <= places.max() < 4 * (20 + 5) + 2 * lapped


@pytest.mark.parametrize("factor", [1, 2])
def test_memory_grows_by_no_more_than_the_pictures(factor, monkeypatch):
    def growth():
        def needed(side):
            def work():
                model = RIAE(SMALL, 1).requires_grad_(False)
                image = torch.zeros(1, 1, side, side)
                size = side * factor, side * factor
                return lambda: model.decode(model.encode(image), size, native=(side, side))

            return trace_peak(work)

        return (needed(256) - needed(128)) / (4 * (256**2 - 128**2))

    assert growth() > 10, "values per pixel of a picture that is one piece"
    monkeypatch.setattr(geometry, "_PIECE", 1 << 12)
    assert growth() < 3 * factor**2, "image, latents and output alone grow"


def test_thin_pictures_are_drawn_in_as_few_pieces_as_their_points_need():
    model, drawn = made(1), []
    latents = torch.randn(1, 5, *model.grid_for((28, 28)))
    model.decode(latents, (1, 2048), native=(28, 28), advance=drawn.append)
    assert sum(drawn) == 2048
    assert len(drawn) <= 2048 / math.isqrt(geometry._PIECE) + 1, "28 points a column, not 28×28"


# Native sizes


@pytest.mark.parametrize(
    ("grid", "size", "native"),
    [
        ((7, 7), (28, 28), (28, 28)),  # the grid's own
        ((7, 7), (26, 25), (26, 25)),  # which ends within the last cells
        ((7, 7), (56, 56), (28, 28)),  # the same picture in more pixels
        ((7, 7), (9, 9), (28, 28)),
        ((7, 7), (100, 90), (28, 25)),  # the largest of that ratio
        ((3, 5), (1000, 1700), (12, 20)),
        ((7, 7), (100, 50), (28, 28)),  # none of that ratio needs all cells
        ((1, 1), (300, 2), (4, 1)),
        ((1, 1), (1, 1), (1, 1)),
    ],
)
def test_native_sizes(grid, size, native):
    assert native_size(grid, size, 4) == native


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.integers(1, 8),
)
def test_a_native_size_needs_all_cells_and_keeps_the_ratio_if_one_can(grid, size, cell):
    native, points = native_size(grid, size, cell), (grid[0] * cell, grid[1] * cell)
    assert lattice_grid(native, cell) == grid
    if native not in (points, size):
        scale = max(side / most for side, most in zip(size, points, strict=True))
        for side, own in zip(size, native, strict=True):
            assert own == 1 or abs(own - side / scale) <= 0.5


@pytest.mark.parametrize("native", [(9, 12), (8, 13), (4, 12), (1, 1), (100, 100)])
def test_a_native_size_of_another_grid_is_one_clear_line(native):
    with pytest.raises(InputError) as caught:
        made().decode(torch.zeros(1, 5, 2, 3), (8, 12), native=native)
    said, cells = str(caught.value), lattice_grid(native, 4)
    assert "\n" not in said
    for words in (f"{native[0]}x{native[1]}", f"{cells[0]}x{cells[1]}", "2x3"):
        assert words in said


@pytest.mark.parametrize("window", [(0, 0, 9, 12), (-1, 0, 4, 4), (3, 0, 3, 4), (0, 5, 4, 4)])
def test_a_window_lies_within_the_picture(window):
    with pytest.raises(InputError, match=re.escape(f"window {window}")):
        made().decode(torch.zeros(1, 5, 2, 3), (8, 12), window)


# Numbers and weights


def test_the_linear_map_is_float32_under_autocast():
    model, image = lossless(), picture(2, 1, 10, 7)
    with torch.autocast("cpu", torch.bfloat16):
        again = model.decode(model.encode(image), (10, 7))
    assert torch.equal(again, image)
    # And with weights that are bfloat16 themselves, which hold a 1 exactly.
    with torch.autocast("cpu", torch.bfloat16):
        again = model.bfloat16().decode(model.encode(image), (10, 7))
    assert torch.equal(again, image)


def test_bfloat16_is_near_float32():
    model, image = made(3), picture(1, 3, 50, 40)
    draw = partial(model.decode, size=(70, 60), native=(50, 40))
    exact = draw(model.encode(image))
    with torch.autocast("cpu", torch.bfloat16):
        latents = model.encode(image)
        rounded = draw(latents)
    assert latents.dtype == rounded.dtype == torch.float32
    assert F.mse_loss(rounded, exact) < 3e-3 * exact.square().mean()


def test_without_the_linear_map_it_begins_with_grey():
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update={"linear": False}), 1)
    latents = model.encode(picture(1, 1, 12, 12))
    assert latents.std() > 0.01
    for size in ((12, 12), (30, 7)):
        assert not model.decode(latents, size).any()


def test_parts_can_be_left_out():
    bare = made(encoder_blocks=0, decoder_blocks=0, features=0)
    assert not bare.blocks() and not any("fine" in name for name, _ in bare.named_parameters())
    image = picture(1, 1, 9, 9)
    assert bare.decode(bare.encode(image), (20, 20)).isfinite().all()
    assert len(made(encoder_blocks=2, decoder_blocks=3).blocks()) == 5
