"""Editing pictures: what stays, what is drawn, and what is refused."""

import pytest
import torch

from r2id.errors import InputError
from r2id.images import psnr, resize
from r2id.sampling import editing
from r2id.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def images(sampler):
    return sampler.sample(torch.arange(3), torch.arange(3), (8, 8))


LABELS, SEEDS = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 7])


def masks_of(images, rows=slice(2, 6), columns=slice(3, 8)):
    masks = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.bool)
    masks[:, :, rows, columns] = True
    return masks


@pytest.mark.parametrize("size", [(8, 8), (4, 6), (11, 7), (64, 40)])
def test_inpainting_keeps_all_other_pixels(sampler, images, size):
    """Of pictures that are encoded at their own size, at a larger one, and at a smaller one."""
    images = resize(images, size).clamp(-1, 1)
    masks = masks_of(images, slice(1, size[0] // 2), slice(2, size[1]))
    drawn = editing.inpaint(sampler, images, masks, LABELS, SEEDS)
    known = ~masks.expand_as(images)
    assert torch.equal(drawn[known], images[known]) and drawn.abs().max() <= 1
    others = editing.inpaint(sampler, images, masks, LABELS, SEEDS + 1)
    assert not torch.equal(drawn[~known], others[~known]), "other seeds, other pictures"
    fewer = editing.inpaint(sampler, images[1:], masks[1:], LABELS[1:], SEEDS[1:])
    assert torch.equal(fewer, drawn[1:]), "whatever else is edited"


@pytest.mark.parametrize("size", [(8, 8), (5, 6), (11, 7), (29, 31)])
def test_what_is_drawn_depends_on_what_is_known(sampler, images, size):
    images = resize(images, size).clamp(-1, 1)
    masks = masks_of(images, slice(size[0] // 4, size[0] // 2), slice(size[1] // 3, size[1]))
    drawn = editing.inpaint(sampler, images, masks, LABELS, SEEDS)
    hidden = torch.where(masks, -images, images)
    assert torch.equal(editing.inpaint(sampler, hidden, masks, LABELS, SEEDS), drawn), (
        "pixels under the mask are not seen"
    )
    around = editing.inpaint(sampler, -images, masks, LABELS, SEEDS)
    assert (around - drawn)[masks].abs().mean() > 0.1


@pytest.mark.parametrize("size", [(11, 7), (29, 31)])
def test_a_resized_pixel_that_a_hidden_one_is_part_of_is_not_known(
    sampler, images, size, monkeypatch
):
    kept, plain = [], editing.put_in
    monkeypatch.setattr(editing, "put_in", lambda *given: kept.append(given[1]) or plain(*given))
    images = resize(images, size).clamp(-1, 1)
    masks = masks_of(images, slice(size[0] // 4, size[0] // 2), slice(size[1] // 3, size[1]))
    editing.inpaint(sampler, images, masks, LABELS, SEEDS, steps=1)
    known = kept[0][:3]
    share = resize(masks.float(), tuple(known.shape[2:])).abs()
    assert known.any() and share[known].max() < 0.01
    assert not known.all() and share[~known].min() > 0


def test_a_harmonic_function_continues_values():
    ramp = torch.linspace(-1, 1, 33).expand(1, 1, 33, 33).clone()
    known = torch.ones_like(ramp, dtype=torch.bool)
    known[:, :, 5:29, 5:29] = False
    holed = torch.where(known, ramp, torch.full_like(ramp, 100.0))
    continued = editing.extend(holed, known)
    assert (continued - ramp).abs().max() < 0.05, "a plane is harmonic"
    nothing = torch.zeros_like(known)
    assert torch.equal(editing.extend(ramp, nothing), torch.zeros_like(ramp))
    assert torch.equal(editing.extend(ramp, ~nothing), ramp)


def test_a_drawn_part_has_the_colour_of_its_border():
    images = torch.full((1, 3, 20, 31), 0.25)
    drawn = torch.full_like(images, -0.5)
    known = ~masks_of(images, slice(4, 20), slice(7, 25))
    assert (editing.put_in(images, known, drawn) - 0.25).abs().max() < 1e-3


def test_outpainting_keeps_the_picture(sampler, images):
    drawn = editing.outpaint(sampler, images, (8, 16), (0, 3), LABELS, SEEDS)
    assert drawn.shape == (3, 1, 8, 16) and torch.equal(drawn[:, :, :, 3:11], images)
    for size, at, message in (
        ((8, 16), (0, 9), r"place \(0, 9\): .* from \(0, 0\) to \(0, 8\)"),
        ((6, 16), (0, 0), "size 6x16: must be at least the picture's own, 8x8"),
        ((8, 8), (0, 0), "size 8x8: .* 8x8, and larger in height or width"),
        ([8, 8], (0, 0), "size 8x8: .* 8x8, and larger in height or width"),
    ):
        with pytest.raises(InputError, match=message):
            editing.outpaint(sampler, images, size, at, LABELS, SEEDS)


def test_variations_leave_the_picture_by_their_strength(sampler, images):
    away = [
        float((editing.vary(sampler, images, LABELS, SEEDS, strength) - images).square().mean())
        for strength in (0.02, 0.3, 1.0)
    ]
    assert away[0] < 0.01 < away[1] < away[2]
    one = editing.vary(sampler, images[1:2], LABELS[1:2], SEEDS[1:2], 0.3)
    assert torch.equal(one, editing.vary(sampler, images, LABELS, SEEDS, 0.3)[1:2])
    larger = editing.vary(sampler, images, LABELS, SEEDS, 0.3, size=(24, 16))
    assert larger.shape == (3, 1, 24, 16)
    for strength in (0.0, 1.5):
        with pytest.raises(InputError, match=f"strength {strength}"):
            editing.vary(sampler, images, LABELS, SEEDS, strength)


def test_upscaled_pictures_are_no_worse_than_resized_ones(sampler, digits):
    from r2id.data.loader import eval_loader
    from r2id.data.shards import ShardSet

    codec = sampler.codec
    loader = eval_loader(ShardSet.open(digits), codec.data, split="test", batch=100, limit=100)
    images = next(iter(loader))["image"]
    small = resize(images, (4, 4)).clamp(-1, 1)
    upscaled = editing.upscale(codec, small, (8, 8))
    errors = [
        psnr((other - images).square().mean((1, 2, 3)))
        for other in (upscaled, resize(small, (8, 8)).clamp(-1, 1))
    ]
    assert errors[0].mean() > errors[1].mean() and (errors[0] - errors[1]).min() > -0.2
    window = editing.upscale(codec, images, (40, 24), (3, 5, 21, 20))
    whole = editing.upscale(codec, images, (40, 24))
    torch.testing.assert_close(window, whole[:, :, 3:21, 5:20], atol=1e-5, rtol=0)
    smaller = editing.upscale(codec, images, (5, 8))
    torch.testing.assert_close(smaller, resize(images, (5, 8)).clamp(-1, 1))


def test_noise_between_two_seeds_keeps_its_variance(sampler, monkeypatch):
    given, plain = [], Sampler.latents
    monkeypatch.setattr(
        Sampler,
        "latents",
        lambda self, *where, noise, **how: (
            given.append(noise) or plain(self, *where, noise=noise, **how)
        ),
    )
    editing.interpolate(sampler, torch.tensor([3, 3, 3]), (0, 9), 3, (8, 8), steps=1)
    first, middle, last = given[0]
    torch.testing.assert_close(middle, (first + last) / 2**0.5)


def test_interpolation_goes_from_seed_to_seed(sampler):
    labels = torch.full((4,), 3)
    between = editing.interpolate(sampler, labels, (0, 9), 4, (12, 8))
    ends = sampler.sample(labels[:2], torch.tensor([0, 9]), (12, 8))
    assert torch.equal(between[[0, -1]], ends)
    steps = (between[1:] - between[:-1]).square().mean((1, 2, 3))
    assert steps.min() > 0 and steps.max() < (ends[0] - ends[1]).square().mean()
    with pytest.raises(InputError, match="count 1"):
        editing.interpolate(sampler, labels[:1], (0, 9), 1, (8, 8))
    with pytest.raises(InputError, match="eta: adds noise"):
        editing.interpolate(sampler, labels, (0, 9), 4, (8, 8), eta=0.5)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(3, 1, 8, 8, dtype=torch.bool), "empty"),
        (torch.ones(3, 1, 8, 8, dtype=torch.bool), "full"),
        (torch.ones(3, 1, 8, 7, dtype=torch.bool), "8x7.*8x8"),
    ],
)
def test_masks_that_do_not_go(sampler, images, masks, message):
    with pytest.raises(InputError, match=message):
        editing.inpaint(sampler, images, masks, LABELS, SEEDS)


def test_pictures_are_edited_at_a_size_that_the_model_copes_with(sampler):
    assert sampler.areas == (16, 16)
    assert editing.edited_size(sampler, (8, 8)) == (8, 8)
    assert editing.edited_size(sampler, (16, 16)) == (8, 8)
    assert editing.edited_size(sampler, (400, 100)) == (16, 4)
    assert editing.edited_size(sampler, (2, 2)) == (8, 8)
    assert editing.edited_size(sampler, (16, 16), (16, 48)) == (8, 24), "a part of a wide one"


@pytest.mark.parametrize(
    ("size", "edited"),
    [
        ((9, 9), (8, 8)),
        ((7, 7), (7, 7)),
        ((5, 5), (8, 8)),
        ((3, 3), (8, 8)),
        ((25, 14), (10, 6)),
        ((14, 25), (6, 10)),
        ((1, 2), (5, 10)),
        ((1, 1000), (1, 32)),
    ],
)
def test_pictures_fill_the_cells_that_they_are_edited_on(sampler, size, edited):
    assert sampler.codec.downsample == 2
    assert editing.edited_size(sampler, size) == edited
