"""Attention that is local in coordinates: what each query sees, at any sizes, and what follows from
it."""

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from r2id.config import LossConfig, RiaeConfig
from r2id.errors import InputError
from r2id.models import layers, visibility
from r2id.models.attention import plain_up_to
from r2id.models.attention_decoder import AttentionDecoder
from r2id.models.coords import grid_coordinates
from r2id.models.riae import RIAE
from r2id.models.tiles import Tiles, rectangles
from r2id.models.tracing import trace_peak
from r2id.training.losses.points import PointLoss

SMALL = RiaeConfig(
    kind="attention",
    attention="tiled",
    tile=4,
    halo=2.0,
    latent_channels=4,
    width=32,
    pixel_width=16,
    heads=2,
    latent_blocks=1,
)
LOSS = LossConfig(decode_pixels=40)
ODD = [
    ((9, 13), (33, 65), 4, 2.0),
    ((5, 3), (7, 11), 2, 0.7),
    ((7, 10), (3, 4), 3, 0.0),
    ((1, 6), (1, 50), 4, 1.3),
]


def made(channels=1, **changes):
    """A model that is no longer the zero function it starts as."""
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update=changes), channels).eval()
    torch.nn.init.normal_(model.to_colour[1].weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return made()


def near(queries, keys, grid, tile, halo):
    """Which keys each query sees, point by point from coordinates in cells: bool [N, M]."""
    sides = torch.tensor([grid[1], grid[0]], dtype=torch.float64)
    query_places, places = ((at[:, :2].double() + 0.5) * sides for at in (queries, keys))
    low = ((query_places / tile).floor() * tile).unsqueeze(1)
    high = torch.minimum(low + tile, sides)
    seen = (places >= low - halo - 1e-5) & (places <= high + halo + 1e-5)  # coordinates are float32
    away = (places - (low + high) / 2).abs()
    nearest = away <= away.min(1, keepdim=True).values + 1e-5
    return torch.where(seen.any(1, keepdim=True), seen, nearest).all(-1)


def through(block, x, context, seen, at, context_at):
    """The block's output from dense attention over what each query sees."""
    out = torch.empty_like(x)
    # Queries that see the same keys are computed together.
    key_sets, number_of_set = torch.unique(seen, dim=0, return_inverse=True)
    for number, keys in enumerate(key_sets):
        mine = number_of_set == number
        out[:, mine] = block(x[:, mine], context[:, keys], at[:, mine], context_at[:, keys])
    return out


def dense(monkeypatch):
    """Make blocks compute what tiled attention must from dense attention and ``near``."""

    def forward(block, x, context, at=None, context_at=None, tiles=None):
        if tiles is None:
            return plain(block, x, context, at, context_at)
        queries, keys = (
            (part[0] / torch.tensor([forward.grid[1], forward.grid[0]]))
            for part in (at, context_at)
        )
        seen = near(queries, keys, forward.grid, forward.tile, forward.halo)
        return through(
            partial(plain, block),
            x,
            context,
            seen,
            at.expand(len(x), -1, -1),
            context_at.expand(len(x), -1, -1),
        )

    plain = layers.CrossBlock.forward
    monkeypatch.setattr(layers.CrossBlock, "forward", forward)
    return forward


@pytest.mark.parametrize(("grid", "size", "tile", "halo"), ODD)
def test_it_is_dense_attention_over_what_is_near(grid, size, tile, halo, monkeypatch):
    model, image = made(tile=tile, halo=halo), torch.randn(2, 1, *size)
    native = 4 * grid[0], 4 * grid[1]
    latents = model.encode(image, native)
    decoded = model.decode(latents, size)
    reference = dense(monkeypatch)
    reference.grid, reference.tile, reference.halo = grid, tile, halo
    torch.testing.assert_close(model.encode(image, native), latents, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(latents, size), decoded, atol=1e-5, rtol=1e-5)
    assert decoded.std() > 0.01


@pytest.mark.parametrize(("grid", "size", "tile", "halo"), ODD)
def test_tiles_list_each_query_once_and_the_keys_near_it(grid, size, tile, halo):
    tiles = Tiles.between(size, grid, grid, tile, halo)
    queries, keys = grid_coordinates(size), grid_coordinates(grid, part=tiles.part)
    listed = tiles.queries[tiles.query_mask]
    assert listed.sort().values.equal(torch.arange(len(queries)))
    expected = near(queries, keys, grid, tile, halo)
    for row, wanted, index, seen in zip(
        tiles.queries[0], tiles.query_mask[0], tiles.keys[0], tiles.key_mask[0], strict=True
    ):
        found = torch.zeros(len(keys), dtype=torch.bool)
        found[index[seen]] = True
        assert seen.sum() == found.sum() and (expected[row[wanted]] == found).all()
    torch.testing.assert_close(tiles.from_tile_order(tiles.to_tile_order(queries, 0), 0), queries)


def test_latent_blocks_may_be_tiled():
    grid = (9, 13)
    block, x, cells = (
        layers.SelfBlock(32, 2, 4.0, gaussian_window=True),
        torch.randn(2, 9 * 13, 32),
        grid_coordinates(grid),
    )
    at = ((cells[:, :2]) * torch.tensor([13.0, 9.0])).unsqueeze(0)

    def attention(queries, keys, at, context_at):
        return block.attention(queries, keys, at, context_at)

    normed = block.norm(x)
    expected = x + through(attention, normed, normed, near(cells, cells, grid, 4, 2.0), at, at)
    expected = expected + block.ffn(block.ffn_norm(expected))
    torch.testing.assert_close(
        block(x, at, Tiles.between(grid, grid, grid, 4, 2.0)), expected, atol=1e-5, rtol=1e-5
    )


def test_a_change_of_one_pixel_reaches_no_further_than_tiles_and_halos():
    """With tiled latent blocks, too: each layer carries it from its tile to the neighbours whose
    halo it lies in."""
    model, image = made(latent_attention="tiled"), torch.randn(1, 1, 16, 160)
    changed = image.clone()
    changed[..., 0] += 1
    moved = (model.encode(changed) - model.encode(image)).abs().amax(dim=(0, 1, 2))
    assert moved[0] > 1e-4 and moved[:8].max() > 0 and moved[8:].max() < 1e-6
    everywhere = made()
    assert (everywhere.encode(changed) - everywhere.encode(image)).abs().amax(dim=(0, 1, 2))[
        8:
    ].max() > 1e-6


def test_a_lonely_tile_sees_its_nearest_key():
    """Four keys of an axis of 32 cells lie at 4, 12, 20 and 28."""
    tiles = Tiles.between((1, 32), (1, 4), (1, 32), tile=2, halo=0.0)
    assert tiles.key_mask.sum(-1).min() == 1
    assert tiles.keys[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("most", [1, 7, 60, 10_000])
def test_rectangles_cover_a_part_once(most):
    size, part = (13, 37), (slice(2, 12), slice(5, 36))
    covered = torch.zeros(size, dtype=torch.int64)
    for rows, columns in rectangles(size, (4, 9), 3, most, part):
        covered[rows, columns] += 1
        assert (rows.stop - rows.start) * (columns.stop - columns.start) <= most
    assert (covered[part] == 1).all() and covered.sum() == covered[part].sum()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2), (16, 16), (17, 31), (65, 33)])
def test_any_size_in_and_out(model, size):
    latents = model.encode(torch.randn(1, 1, *size))
    assert latents.shape == (1, 4, *model.grid_for(size))
    for out in [(1, 1), (2, 9), (40, 23)]:
        image = model.decode(latents, out)
        assert (
            image.shape == (1, 1, *out) and image.dtype == torch.float32 and image.isfinite().all()
        )


@pytest.mark.parametrize("kind", ["cloud", "tiled"])
@pytest.mark.parametrize(
    ("grid", "size", "cuts"), [((9, 7), (61, 47), (0, 1, 20, 47)), ((3, 5), (33, 50), (0, 17, 33))]
)
def test_windows_make_the_whole(kind, grid, size, cuts, monkeypatch):
    model, latents = made(attention=kind), torch.randn(2, 4, *grid)
    whole = model.decode(latents, size)
    monkeypatch.setattr(visibility, "_TILES_CHUNK", 500)
    monkeypatch.setattr(visibility, "_DECODE_CHUNK", 500)
    ys, xs = sorted({*cuts, size[0]}), sorted({*cuts, size[1]})
    rows = [
        torch.cat([model.decode(latents, size, (y0, x0, y1, x1)) for x0, x1 in pairwise(xs)], dim=3)
        for y0, y1 in pairwise(ys)
    ]
    torch.testing.assert_close(torch.cat(rows, dim=2), whole, atol=1e-5, rtol=1e-4)
    assert whole.std() > 0.01


@pytest.mark.parametrize("window", [(0, 0, 9, 12), (-1, 0, 4, 4), (3, 0, 3, 4), (0, 5, 4, 4)])
def test_a_window_lies_within_the_picture(model, window):
    with pytest.raises(InputError, match=re.escape(f"window {window}")):
        model.decode(torch.zeros(1, 4, 2, 3), (8, 12), window)


@pytest.mark.parametrize("chunk", [64, 500])
def test_chunks_change_nothing(model, chunk, monkeypatch):
    images = torch.randn(3, 1, 45, 52)
    latents = model.encode(images)
    decoded = model.decode(latents, (70, 31))
    monkeypatch.setattr(visibility, "_TILES_CHUNK", chunk)
    torch.testing.assert_close(model.encode(images), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model.decode(latents, (70, 31)), decoded, atol=1e-5, rtol=1e-4)


def test_memory_grows_with_neither_input_nor_output(monkeypatch):
    def growth():
        def needed(side):
            def work():
                model = RIAE(SMALL.model_copy(update={"latent_blocks": 0}), 1)
                return lambda: model.decode(
                    model.encode(torch.zeros(1, 1, side, side)), (side, side)
                )

            return trace_peak(work)

        return (needed(128) - needed(64)) / (4 * (128**2 - 64**2))

    assert growth() > 50, "values per pixel of a picture that is one chunk"
    monkeypatch.setattr(visibility, "_TILES_CHUNK", 1024 // visibility._GPU_FACTOR)
    assert growth() < 16, "image, latents, keys and output alone grow"


def test_a_translated_picture_has_translated_latents():
    """By as many cells as features repeat after, away from borders."""
    model = made(cell_fourier=(-1, 2), latent_blocks=0)
    picture = torch.randn(1, 1, 64, 80)
    moved = model.encode(picture[:, :, :, 16:])[..., 4:-4, 4:-4]
    torch.testing.assert_close(moved, model.encode(picture)[..., 4:-4, 8:-4], atol=1e-4, rtol=1e-3)
    assert moved.std() > 0.01


def test_bfloat16_is_near_float32():
    model = made()
    image = torch.rand(1, 1, 120, 90) * 2 - 1
    exact = model.decode(model.encode(image), (120, 90))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.decode(model.encode(image), (120, 90))
    assert rounded.dtype == torch.float32
    assert F.mse_loss(rounded, exact) < 3e-3 * exact.square().mean()


def test_both_kernels_agree_on_tiles(model):
    latents = model.encode(torch.randn(1, 1, 30, 50))
    plain = model.decode(latents, (37, 29))
    with plain_up_to(0):
        fused = model.decode(latents, (37, 29))
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "of_model"),
    [
        ({}, {}),
        ({"jitter": 0.0}, {}),
        (
            {"encode_scales": (0.5, 1.0)},
            {"decode_scales": (0.5, 2.0), "condition_on_pixel_size": True},
        ),
        ({"decode_pixels": 10**6}, {}),
        ({"texture": 0.5}, {}),
        ({}, {"latent_attention": "tiled"}),
    ],
)
def test_loss_depends_on_step_and_sample_alone_and_reaches_all_weights(changes, of_model):
    loss = PointLoss(made(**of_model).train(), LOSS.model_copy(update=changes), seed=3)
    image, index = torch.rand(4, 1, 37, 45) * 2 - 1, torch.tensor([5, 9, 2, 7])
    whole, figures = loss(image, index, step=11)
    halves = [loss(image[part], index[part], step=11)[0] for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, sum(halves) / 2)
    assert "texture" in changes or torch.equal(figures["mse"], whole.detach())
    whole.backward()
    for name, weight in loss.model.named_parameters():
        assert (
            weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0
        ), name


def test_the_loss_is_the_image_s_mean_error():
    """Of all tiles exactly, although those at the edges are smaller; of random ones on average."""
    model = RIAE(SMALL, 1)  # it starts by guessing 0
    every, some = (LossConfig(jitter=0.0, decode_pixels=count) for count in (45 * 37, 40))
    image = torch.rand(1, 1, 45, 37).cumsum(2) / 20
    value, _ = PointLoss(model, every, seed=0)(image, torch.arange(1), step=0)
    torch.testing.assert_close(value, image.square().mean())
    with torch.no_grad():
        drawn = torch.stack(
            [PointLoss(model, some, seed=0)(image, torch.arange(1), step)[0] for step in range(100)]
        )
    assert (
        abs(drawn.mean() - value) < 4 * drawn.std() / math.sqrt(len(drawn))
        and drawn.std() > 0.1 * value
    )


def test_a_step_decodes_no_more_of_a_larger_image(monkeypatch):
    decoded = []
    plain = AttentionDecoder.decode_points
    monkeypatch.setattr(
        AttentionDecoder,
        "decode_points",
        lambda decoder, keys, cells, at, size, grid, tiles: (
            decoded.append(at.shape[1]),
            plain(decoder, keys, cells, at, size, grid, tiles),
        )[1],
    )
    for side in (32, 64, 128):
        PointLoss(made(), LossConfig(decode_pixels=512), seed=0)(
            torch.zeros(1, 1, side, side), torch.arange(1), step=0
        )
    assert decoded == [512, 512, 512]


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = RIAE(SMALL.model_copy(update={"tile": 2, "halo": 1.0}), 3)
    loss = PointLoss(model, LOSS.model_copy(update={"jitter": 0.0}), seed=0)
    images = F.interpolate(torch.rand(4, 3, 3, 3) * 2 - 1, (12, 12), mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(350):
        value, _ = loss(images, torch.arange(4), step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert F.mse_loss(model.decode(model.encode(images), (12, 12)), images) < 0.2 * images.var()
