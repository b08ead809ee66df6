"""Small pictures that show what a trained R2ID draws: samples of each size, and one seed at many.

Shape letters: N samples · C colours · H, W image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from r2id.errors import InputError
from r2id.images import resize, save_png, tile
from r2id.models.coords import Size
from r2id.progress import Progress, say
from r2id.sampling.conditions import spread_labels
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

LADDER = "one-seed-many-sizes.png"
_COUNT, _ROWS, _MANY = 10, 4, 4
"""Samples of a size, how many of them are shown at many sizes, and how many sizes are many; few, to
be drawn soon."""
_SIDE, _HEIGHT, _GAP = 640, 96, 6
"""In pixels: about the longer side of a grid; the height of a picture beside others, and the gap
between them."""


def draw_thumbnails(sampler: Sampler, folder: Path) -> list[Size]:
    """Draw samples into a folder: ``HxW.png`` for each size, and all sizes side by side (LADDER).

    The sizes are the run's own and the training images'; if these are few, twice those too, and
    those stretched both ways. What does not fit into memory is left out. Each sample has the same
    seed and condition at all of them. Returns the sizes, in the order of LADDER's columns.
    """
    check_samples(sampler, sampler.codec.image, None, _COUNT)  # that one is always drawn
    sizes = [size for size in _sizes(sampler) if _fits(sampler, size)]
    count = min(_COUNT, sampler.num_classes or _COUNT)
    first = sampler.defaults.seed
    labels, seeds = spread_labels(count, sampler.num_classes), torch.arange(count) + first
    drawn = []
    with Progress("thumbnails", len(sizes), unit="sizes") as progress:
        for size in sizes:
            images = sampler.sample(labels, seeds, size)
            save_png(_enlarged(tile(images, columns=5)), folder / f"{size[0]}x{size[1]}.png")
            drawn.append(images[:_ROWS])
            progress.advance(1)
    save_png(_side_by_side(drawn), folder / LADDER)
    return sizes


def _sizes(sampler: Sampler) -> list[Size]:
    """Return the sizes to draw, the smaller first."""
    height, width = sampler.codec.image
    wanted = {*sampler.defaults.sizes, (height, width)}
    if len(wanted) < _MANY:
        stretched = (height + (height + 1) // 2, width), (height, width + (width + 1) // 2)
        wanted |= {*stretched, (2 * height, 2 * width)}
    return sorted(wanted, key=lambda size: (size[0] * size[1], size))


def _fits(sampler: Sampler, size: Size) -> bool:
    try:
        check_samples(sampler, size, None, _COUNT)
    except InputError as error:
        say(f"not among the pictures: {error}")
        return False
    return True


def _side_by_side(drawn: Sequence[Tensor]) -> Tensor:
    """Join the same N samples at several sizes, [N, C, H, W] each, to one image [C, H', W'].

    Rows are samples. All have one height there, and keep their own aspect ratio.
    """
    columns = []
    for images in drawn:
        height, width = images.shape[2:]
        size = _HEIGHT, max(1, round(_HEIGHT * width / height))
        # Enlarged pixels stay squares, so that one sees how many there are.
        shown = F.interpolate(images, size) if height < _HEIGHT else resize(images, size)
        columns.append(tile(shown, columns=1, gap=_GAP))
    return torch.cat(columns, dim=2)


def _enlarged(image: Tensor) -> Tensor:
    """Enlarge the pixels of a small image [C, H, W] by a whole factor."""
    factor = max(1, _SIDE // max(image.shape[1:]))
    return F.interpolate(image.unsqueeze(0), scale_factor=factor)[0]
