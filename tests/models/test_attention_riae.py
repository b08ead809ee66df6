"""RIAE by attention: any size in, any size out, and what it must not depend on."""

import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from r2id.config import LossConfig, RiaeConfig
from r2id.errors import InputError
from r2id.models import attention_decoder as decoder
from r2id.models import attention_encoder as encoder
from r2id.models.attention_decoder import AttentionDecoder
from r2id.models.riae import RIAE
from r2id.models.tracing import trace_peak
from r2id.training.losses.points import PointLoss

SMALL = RiaeConfig(
    kind="attention",
    latent_channels=4,
    width=32,
    pixel_width=16,
    heads=2,
    encoder_blocks=1,
    decoder_blocks=1,
)
LOSS = LossConfig(encode_cloud=0.5, decode_cloud=0.5, decode_pixels=40)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return RIAE(SMALL, channels=1).eval()


def drawing(channels=1):
    """A model that is no longer the zero function it starts as."""
    torch.manual_seed(0)
    model = RIAE(SMALL, channels).eval()
    torch.nn.init.normal_(model.to_colour[1].weight, std=0.3)
    return model


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (28, 28), (30, 17)])
@pytest.mark.parametrize("out", [(1, 1), (7, 3), (40, 24)])
def test_any_size_in_and_out(model, size, out):
    latents = model.encode(torch.randn(2, 1, *size))
    assert latents.shape == (2, 4, *model.grid_for(size))
    image = model.decode(latents, out)
    assert image.shape == (2, 1, *out) and image.dtype == torch.float32 and image.isfinite().all()


def test_grid_for_rounds_and_never_vanishes(model):
    assert (
        model.grid_for((28, 28)) == (7, 7)
        and model.grid_for((1, 2)) == (1, 1)
        and model.grid_for((42, 28)) == (10, 7)
    )


def test_a_picture_does_not_depend_on_its_batch(model):
    images = torch.randn(3, 1, 12, 12)
    together = model.decode(model.encode(images), (9, 9))
    alone = model.decode(model.encode(images[1:2]), (9, 9))
    torch.testing.assert_close(together[1:2], alone, atol=1e-5, rtol=1e-4)


def test_order_of_pixels_does_not_matter(model):
    """The encoder sees a set of points: shuffled, they are the same image."""
    from r2id.models.coords import grid_coordinates

    at, cells, order = (
        grid_coordinates((6, 6)),
        grid_coordinates((2, 2)).unsqueeze(0),
        torch.randperm(36),
    )
    colours = torch.randn(1, 36, 1)
    torch.testing.assert_close(
        model.parts.encoder.encode_points(colours, at.unsqueeze(0), cells, (2, 2)),
        model.parts.encoder.encode_points(colours[:, order], at[order].unsqueeze(0), cells, (2, 2)),
        atol=1e-5,
        rtol=1e-4,
    )


def test_decoding_in_chunks_changes_nothing(model, monkeypatch):
    latents = torch.randn(2, 4, 3, 3)
    whole = model.decode(latents, (20, 11))
    monkeypatch.setattr(decoder, "_CHUNK", 14)
    torch.testing.assert_close(model.decode(latents, (20, 11)), whole, atol=1e-5, rtol=1e-4)


def test_large_pixels_are_means_of_points(model):
    """Of an image of about 24×28 pixels, none larger than the model was trained on."""
    latents = torch.randn(2, 4, 6, 7)
    assert [
        model.parts.decoder.points_per_pixel((6, 7), size)
        for size in ((60, 70), (24, 28), (22, 26), (21, 26), (24, 13), (7, 4))
    ] == [(1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (4, 7)]
    torch.testing.assert_close(
        model.decode(latents, (8, 28)), F.avg_pool2d(model.decode(latents, (24, 28)), (3, 1))
    )
    torch.testing.assert_close(
        model.decode(latents, (8, 7), (1, 2, 7, 7)), model.decode(latents, (8, 7))[:, :, 1:7, 2:]
    )


def test_means_are_taken_of_some_rows_at_a_time(monkeypatch):
    torch.manual_seed(0)
    model = RIAE(SMALL, 1).eval()
    for parameter in model.parts.decoder.to_colour.parameters():
        torch.nn.init.normal_(parameter)
    latents = torch.randn(2, 4, 16, 12)
    whole = model.decode(latents, (8, 7), (1, 0, 8, 5))
    monkeypatch.setattr(decoder, "_BAND", 2 * 3 * 8 * 7 * 35)
    torch.testing.assert_close(
        model.decode(latents, (8, 7), (1, 0, 8, 5)), whole, atol=1e-5, rtol=1e-4
    )

    coarse = SMALL.model_copy(update={"downsample": 16.0})

    def needed(band):
        monkeypatch.setattr(decoder, "_BAND", band)
        fresh = partial(RIAE, coarse, 3)
        return trace_peak(
            lambda: partial(fresh().requires_grad_(False).decode, torch.zeros(1, 4, 64, 64), (8, 8))
        )

    per_pixel = RIAE(coarse, 3).parts.decoder.points_per_pixel((64, 64), (8, 8))
    points = 3 * 4 * math.prod(side * 8 for side in per_pixel)
    assert needed(1 << 30) - needed(1) > 0.5 * points, "not the whole picture at once"


@pytest.mark.parametrize(
    ("grid", "size", "cuts"), [((9, 7), (61, 47), (0, 1, 20, 47)), ((3, 5), (33, 50), (0, 17, 33))]
)
def test_windows_make_the_whole(grid, size, cuts, monkeypatch):
    model, latents = drawing(), torch.randn(2, 4, *grid)
    whole = model.decode(latents, size)
    monkeypatch.setattr(decoder, "_CHUNK", 500)
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


def test_bfloat16_is_near_float32():
    model, image = drawing(), torch.rand(1, 1, 120, 90) * 2 - 1
    exact = model.decode(model.encode(image), (120, 90))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model.decode(model.encode(image), (120, 90))
    assert rounded.dtype == torch.float32
    assert F.mse_loss(rounded, exact) < 3e-3 * exact.square().mean()


def test_encoding_in_chunks_changes_nothing_but_the_memory(model, monkeypatch):
    images = torch.randn(5, 1, 12, 9)
    whole = model.encode(images)
    monkeypatch.setattr(encoder, "_CHUNK", 2 * 12 * 9)
    torch.testing.assert_close(model.encode(images), whole, atol=1e-5, rtol=1e-4)

    def needed(count):
        return trace_peak(lambda: partial(RIAE(SMALL, 1).encode, torch.zeros(count, 1, 48, 36)))

    monkeypatch.setattr(encoder, "_CHUNK", 2 * 48 * 36)
    pixels = 8 * 48 * 36 * 4
    assert needed(2) > 10 * pixels and needed(10) - needed(2) < 3 * pixels, (
        "images and latents alone grow"
    )


@pytest.mark.parametrize(
    "changes", [{}, {"jitter": 0.0}, {"decode_pixels": 10**6}, {"texture": 0.5}]
)
def test_loss_depends_on_step_and_sample_alone_and_reaches_all_weights(changes):
    loss = PointLoss(drawing().train(), LOSS.model_copy(update=changes), seed=3)
    image, index = torch.rand(4, 1, 10, 8) * 2 - 1, torch.tensor([5, 9, 2, 7])
    whole, figures = loss(image, index, step=11)
    halves = [loss(image[part], index[part], step=11)[0] for part in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(whole, sum(halves) / 2)
    assert whole != loss(image, index, step=12)[0]
    assert "texture" in changes or torch.equal(figures["mse"], whole.detach())
    whole.backward()
    for name, weight in loss.model.named_parameters():
        assert (
            weight.grad is not None and weight.grad.isfinite().all() and weight.grad.abs().max() > 0
        ), name


def test_a_step_decodes_no_more_of_a_larger_image(monkeypatch):
    decoded = []
    plain = AttentionDecoder.decode_points
    monkeypatch.setattr(
        AttentionDecoder,
        "decode_points",
        lambda decoder, keys, cells, at, grid: (
            decoded.append(at.shape[1]),
            plain(decoder, keys, cells, at, grid),
        )[1],
    )
    for side in (32, 64, 128):
        PointLoss(drawing(), LossConfig(decode_pixels=512), seed=0)(
            torch.zeros(1, 1, side, side), torch.arange(1), step=0
        )
    assert decoded == [512, 512, 512]


def test_a_new_model_s_loss_is_the_colours_mean_square():
    """It starts by guessing 0 everywhere."""
    torch.manual_seed(0)
    config = LOSS.model_copy(update={"jitter": 0.0, "decode_pixels": 144})
    image = torch.rand(8, 1, 12, 12) * 2 - 1
    value, _ = PointLoss(RIAE(SMALL, 1), config, seed=0)(image, torch.arange(8), step=0)
    torch.testing.assert_close(value, image.square().mean())


@pytest.mark.parametrize(("cloud", "left"), [(0.25, 0.4), (1.0, 0.15)])
def test_overfits_one_batch(cloud, left):
    torch.manual_seed(0)
    model = RIAE(SMALL, 3)
    loss = PointLoss(model, LossConfig(encode_cloud=cloud, decode_pixels=40, jitter=0.0), seed=0)
    images = F.interpolate(torch.rand(4, 3, 3, 3) * 2 - 1, (12, 12), mode="bilinear")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        value, _ = loss(images, torch.arange(4), step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    error = F.mse_loss(model.decode(model.encode(images), (12, 12)), images)
    assert error < left * images.var()


def test_texture_is_the_error_of_the_slope():
    """An untrained decoder says 0 everywhere, so that the term is the square of the image's own
    slope."""
    model = RIAE(SMALL, 1)
    changes = {"jitter": 0.0, "decode_pixels": 400}
    image = (
        (torch.arange(40.0) / 20 - 1).expand(1, 1, 40, 40).contiguous()
    )  # 1/20 per pixel from left to right
    with torch.no_grad():
        plain, textured = (
            sum(
                PointLoss(model, LOSS.model_copy(update={**changes, "texture": weight}), seed=0)(
                    image, torch.tensor([0]), step
                )[0]
                for step in range(4)
            )
            / 4
            for weight in (0.0, 3.0)
        )
    assert (textured - plain) / 3 == pytest.approx(0.05**2 / 2, rel=0.15)
