"""Editing pictures of any size with a trained R2ID: vary, inpaint, outpaint, upscale, interpolate.

A picture is edited in latents, on a grid of about as many cells as the R2ID was trained on (see
``edited_size``), and drawn again at its own size.

To inpaint, samples are drawn as always, but each estimate is corrected by what is known: it is
decoded, the known pixels are put in, and the result is encoded again. Where the drawn part meets
the known one, it is shifted in colour so that both agree along the border, and less and less away
from it: the shift is the harmonic function with these values at the border (Pérez et al. 2003). So
there is no seam, and the model sees none that it would have to keep. Known pixels come back
unchanged.

Shape letters: B batch · C colours · H, W picture · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from r2id.errors import InputError
from r2id.images import resize
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window, are_whole, part_of, scale_size
from r2id.models.resampling import resample
from r2id.sampling.conditions import resolve
from r2id.sampling.sampler import Sampler
from r2id.sampling.steps import Watch

_MARGIN = 8
"""Known pixels around a mask, at most, whose colours the drawn ones are shifted to."""
_SMOOTHINGS = 20
"""Rounds of averaging at each scale of ``extend``."""


def edited_size(sampler: Sampler, size: Size, within: Size | None = None) -> Size:
    """Return the size at which a picture of a size (H, W) is encoded to be edited.

    It is the picture's own, if that has as many latent cells as the R2ID was trained on. Otherwise
    it is the largest of its shape that has no more cells than that, so that the picture fills them:
    a cell that a picture hardly touches shows what training never did. ``within`` is the size of a
    larger picture, of which this one is a part: that one's size is returned then, at the scale of
    the part.
    """
    cells = math.prod(sampler.codec.grid_for(size))
    wanted = min(max(cells, sampler.areas[0]), sampler.areas[1])
    if cells == wanted:
        return within or size
    longer = max(size)
    pixels = wanted * sampler.codec.downsample**2
    for side in range(int(longer * math.sqrt(pixels / math.prod(size)) + 1e-6), 0, -1):
        scale = side / longer
        if math.prod(sampler.codec.grid_for(scale_size(size, (scale, scale)))) <= wanted:
            break
    return scale_size(within or size, (scale, scale))


def vary(
    sampler: Sampler,
    images: Tensor,
    condition: Tensor,
    seeds: Tensor,
    strength: float,
    *,
    size: Size | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Tensor:
    """Draw images like others: add noise to their latents, and remove it again.

    images [B, C, H, W] in [−1, 1] · condition and seeds [B], as for Sampler.sample · strength in
    (0, 1]: from nearly nothing to all but a new sample · size of the results, by default the
    images' own · settings of Sampler.sample. → float32 [B, C, H', W'] in [−1, 1], on the CPU.

    What the autoencoder loses of the images is kept, the less of it the more is changed.
    """
    _check_strength(strength)
    own: Size = (images.shape[2], images.shape[3])
    native, codec = edited_size(sampler, own), sampler.codec
    # One at a time, so that an image has the same bits in any batch.
    start = torch.cat([codec.encode(image[None], native) for image in images])
    latents = sampler.latents(
        condition,
        seeds,
        codec.grid_for(native),
        start=start,
        strength=strength,
        watch=watch,
        **settings,
    )
    drawn = sampler.render(latents, size or own, native)
    lost = images.cpu() - sampler.render(start, own, native)
    return (drawn + (1 - strength) * resize(lost, size or own)).clamp(-1, 1)


def inpaint(
    sampler: Sampler,
    images: Tensor,
    masks: Tensor,
    condition: Tensor,
    seeds: Tensor,
    *,
    watch: Watch | None = None,
    **settings: Any,
) -> Tensor:
    """Draw the masked parts of images anew, to fit the rest.

    images [B, C, H, W] in [−1, 1] · masks bool [B, 1, H, W], true where pixels are drawn ·
    condition, seeds and settings as for Sampler.sample. → float32 [B, C, H, W] in [−1, 1], on the
    CPU, with all other pixels unchanged. Raises InputError for a mask that is empty or full.
    """
    native = edited_size(sampler, (images.shape[2], images.shape[3]))
    return _fill(sampler, images, masks, native, condition, seeds, watch, settings)


def _fill(
    sampler: Sampler,
    images: Tensor,
    masks: Tensor,
    native: Size,
    condition: Tensor,
    seeds: Tensor,
    watch: Watch | None,
    settings: dict[str, Any],
) -> Tensor:
    """Draw the masked parts of images anew, edited at a native size; see ``inpaint``."""
    _check_masks(images, masks)
    own: Size = (images.shape[2], images.shape[3])
    codec, known = sampler.codec, ~masks
    # Hidden pixels are replaced, so that nothing of them is seen in a resized picture. Each is made
    # by itself, so that an image has the same bits in any batch.
    seen = torch.cat([resize(image[None], native) for image in extend(images, known)])
    # A pixel of a resized picture is known when all pixels that it is made of are. Some of them
    # count negatively, so that hidden ones may raise the sum as well.
    seen_known = (resize(known.float(), native) - 1).abs() < 1e-3
    seen, seen_known = seen.to(codec.device), seen_known.to(codec.device)

    def correct(rows: Tensor, latents: Tensor) -> Tensor:
        rows = rows.to(codec.device)
        drawn = codec.decode(latents, native, native=native)
        return codec.encode(put_in(seen[rows], seen_known[rows], drawn), native)

    latents = sampler.latents(
        condition, seeds, codec.grid_for(native), adjust=correct, watch=watch, **settings
    )
    edited = images.cpu().clone()
    for number, image in enumerate(edited):
        # Only what surrounds the mask is drawn, so that a large picture takes no more than a small.
        window = _around(masks[number, 0].cpu())
        rows, columns = part_of(own, window)
        drawn = codec.decode(latents[number : number + 1], own, window, native).cpu()
        part = known[number : number + 1, :, rows, columns].cpu()
        image[:, rows, columns] = put_in(image[None, :, rows, columns], part, drawn)[0]
    return edited


def _around(mask: Tensor) -> Window:
    """Return the smallest window that holds all of a mask [H, W] and a margin of known pixels."""
    starts, stops = [], []
    for axis, side in enumerate(mask.shape):
        drawn = mask.any(1 - axis).nonzero()
        starts.append(max(0, int(drawn.min()) - _MARGIN))
        stops.append(min(side, int(drawn.max()) + 1 + _MARGIN))
    return starts[0], starts[1], stops[0], stops[1]


def outpaint(
    sampler: Sampler,
    images: Tensor,
    size: Size,
    at: Size,
    condition: Tensor,
    seeds: Tensor,
    *,
    watch: Watch | None = None,
    **settings: Any,
) -> Tensor:
    """Continue images beyond their borders: they become the part ``at`` (y, x) of larger ones.

    images [B, C, H, W] in [−1, 1] · size (H', W') of the results. The rest as for ``inpaint``.
    Raises InputError when the images are not within that size, or nothing is added.
    """
    own: Size = (images.shape[2], images.shape[3])
    if size[0] < own[0] or size[1] < own[1] or tuple(size) == own:
        raise InputError(
            f"size {size[0]}x{size[1]}: must be at least the picture's own, {own[0]}x{own[1]}, "
            "and larger in height or width"
        )
    most = size[0] - own[0], size[1] - own[1]
    if not are_whole(at, 2) or not (0 <= at[0] <= most[0] and 0 <= at[1] <= most[1]):
        raise InputError(
            f"place {at!r}: must be (y, x) in whole pixels, from (0, 0) to {most}, so that the "
            f"picture of {own[0]}x{own[1]} is within {size[0]}x{size[1]}"
        )
    canvas = torch.zeros(len(images), images.shape[1], *size)
    masks = torch.ones(len(images), 1, *size, dtype=torch.bool)
    rows, columns = (slice(first, first + side) for first, side in zip(at, own, strict=True))
    canvas[:, :, rows, columns], masks[:, :, rows, columns] = images.cpu(), False
    native = edited_size(sampler, own, size)
    return _fill(sampler, canvas, masks, native, condition, seeds, watch, settings)


def upscale(codec: Codec, images: Tensor, size: Size, window: Window | None = None) -> Tensor:
    """Resize images, and add the detail that the decoder draws at that size beyond its native one.

    images [B, C, H, W] in [−1, 1] · size (H', W') of the results · window (y0, x0, y1, x1): only
    that part of them. → float32 in [−1, 1], on the CPU.

    The images themselves are resized, so that what the autoencoder loses of them is not lost here.
    How much of the detail is added is learnt from each image: a smaller copy of it is upscaled to
    its own size, where the share that fits best is known. It is 0 where detail only harms.
    """
    own: Size = (images.shape[2], images.shape[3])
    images, part = images.cpu(), part_of(size, window)
    resized = resample(images, size, part)
    if size[0] <= own[0] and size[1] <= own[1]:
        return resized.clamp(-1, 1)
    smaller: Size = (
        max(1, min(own[0], round(own[0] ** 2 / size[0]))),
        max(1, min(own[1], round(own[1] ** 2 / size[1]))),
    )
    copy = resize(images, smaller).clamp(-1, 1)
    missing, detail = images - resize(copy, own), _detail(codec, copy, own)
    fit = (missing * detail).sum((1, 2, 3), keepdim=True)
    share = fit / detail.square().sum((1, 2, 3), keepdim=True).clamp(min=1e-9)
    return (resized + share.clamp(0, 1) * _detail(codec, images, size, window)).clamp(-1, 1)


def _detail(codec: Codec, images: Tensor, size: Size, window: Window | None = None) -> Tensor:
    """Return what the decoder draws of images at a size, less its native drawing resized to it."""
    own: Size = (images.shape[2], images.shape[3])
    latents = codec.encode(images)
    native = codec.decode(latents, own, native=own).cpu()
    drawn = codec.decode(latents, size, window, native=own).cpu()
    return drawn - resample(native, size, part_of(size, window))


def interpolate(
    sampler: Sampler,
    condition: Tensor,
    seeds: tuple[int, int],
    count: int,
    size: Size,
    *,
    watch: Watch | None = None,
    **settings: Any,
) -> Tensor:
    """Draw images whose noise goes from one seed's to another's, in ``count`` even steps.

    condition [count], as for Sampler.sample · size (H, W) · settings of Sampler.sample.
    → float32 [count, C, H, W] in [−1, 1], on the CPU; the first and the last are the seeds' own.
    """
    if count < 2:
        raise InputError(f"count {count}: must be at least 2, the two seeds' own pictures")
    if resolve(sampler, **settings).eta:
        raise InputError("eta: adds noise at each step, which no two seeds share; must be 0")
    grid = sampler.grid_for(size)
    first, last = sampler.noise(torch.tensor(seeds), grid).cpu()
    # Weights on a circle: the sum of independent noises keeps its variance.
    angles = torch.linspace(0, math.pi / 2, count, dtype=torch.float32)[:, None, None, None]
    noise = first * angles.cos() + last * angles.sin()
    noise[0], noise[-1] = first, last
    latents = sampler.latents(
        condition, torch.full((count,), seeds[0]), grid, noise=noise, watch=watch, **settings
    )
    return sampler.render(latents, size)


def put_in(images: Tensor, known: Tensor, drawn: Tensor) -> Tensor:
    """Put known pixels into drawn images, whose colours are shifted to fit along the border.

    images and drawn [B, C, H, W], known bool [B, 1, H, W] → [B, C, H, W] in [−1, 1].
    """
    shift = extend(images - drawn, known)
    return torch.where(known, images, (drawn + shift).clamp(-1, 1))


def extend(values: Tensor, known: Tensor) -> Tensor:
    """Continue known values smoothly, as a harmonic function, to where they are not known.

    values [B, C, H, W], known bool [B, 1, H, W] → [B, C, H, W]. From coarse to fine scales, each
    of which begins with the coarser one's result.
    """
    height, width = values.shape[2:]
    weights = known.to(values.dtype)
    values = values * weights
    if max(height, width) <= 2:
        mean = values.sum((2, 3), keepdim=True) / weights.sum((2, 3), keepdim=True).clamp(min=1)
        return torch.where(known, values, mean)
    # Sums over blocks of 2×2 pixels; those beyond an odd side count as not known.
    odd = (0, width % 2, 0, height % 2)
    totals, counts = (4 * F.avg_pool2d(F.pad(part, odd), 2) for part in (values, weights))
    coarse = extend(totals / counts.clamp(min=1), counts > 0)
    guess = F.interpolate(coarse, scale_factor=2, mode="bilinear")[:, :, :height, :width]
    extended = torch.where(known, values, guess)
    for _ in range(_SMOOTHINGS):
        near = F.pad(extended, (1, 1, 1, 1), mode="replicate")
        mean = (near[:, :, :-2, 1:-1] + near[:, :, 2:, 1:-1] + near[:, :, 1:-1, :-2]) + near[
            :, :, 1:-1, 2:
        ]
        extended = torch.where(known, values, mean / 4)
    return extended


def _check_strength(strength: float) -> None:
    if not isinstance(strength, Real) or not 0 < strength <= 1:
        raise InputError(f"strength {strength!r}: must be above 0 and at most 1")


def _check_masks(images: Tensor, masks: Tensor) -> None:
    expected = (len(images), 1, *images.shape[2:])
    if tuple(masks.shape) != expected:
        raise InputError(
            f"mask of {masks.shape[-2]}x{masks.shape[-1]} pixels: must have the size of the "
            f"picture, {images.shape[2]}x{images.shape[3]}"
        )
    drawn = masks.flatten(1)
    if not drawn.any(1).all():
        raise InputError(
            "mask: is empty; pixels that are to be drawn must be white, 128 or more of 255"
        )
    if drawn.all(1).any():
        raise InputError("mask: is full; pixels that are to stay must be black")
