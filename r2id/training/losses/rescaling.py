"""Training images at random sizes.

Shape letters: B batch · C colours · H, W image.
"""

from __future__ import annotations

from torch import Tensor

from r2id import rng
from r2id.images import resize
from r2id.models.coords import Size

_FACTORS = 8  # how many different factors a side may be scaled by


def random_size(size: Size, scales: tuple[float, float], *key: int) -> Size:
    """Multiply a height and a width by random factors within ``scales``; at least 1×1.

    The random key makes the factors the same for the whole batch.
    """
    # Few factors, evenly spaced by logarithm: PyTorch prepares and keeps kernels for every shape
    # that it meets, about a gigabyte on a CPU for a thousand shapes.
    places = (int(_FACTORS * rng.number(*key, axis)) / (_FACTORS - 1) for axis in range(2))
    height, width = (
        max(1, round(side * scales[0] * (scales[1] / scales[0]) ** place))
        for side, place in zip(size, places, strict=True)
    )
    return height, width


def rescaled(image: Tensor, scales: tuple[float, float] | None, *key: int) -> Tensor:
    """Resize images [B, C, H, W] to a random height and width, by factors within ``scales``.

    Bicubic, with averaging where they shrink; see random_size.
    """
    if scales is None:
        return image
    return resize(image, random_size((image.shape[2], image.shape[3]), scales, *key))
