"""The start of an RIAE's linear map: a principal component analysis (PCA) of training images.

The colours at a cell's lattice points, C·s² values, are projected on their L principal components,
each scaled to variance 1. Of all linear codes of L values it has the least squared error (Eckart &
Young 1936). It takes seconds, and what it needs is bounded: at most _IMAGES images and about
_PIXELS pixels are read, and at most _CELLS cells are used; beside a batch of images, it holds a
matrix of (C·s²)² numbers.

Shape letters: B batch · N = C·s² values of a cell · h, w latent grid · L latent channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from r2id import rng
from r2id.errors import InputError
from r2id.models.cells import on_lattice, to_cells
from r2id.models.coords import Size
from r2id.models.lapped import lap
from r2id.models.riae import RIAE

_IMAGES = 4096
_PIXELS = 1 << 25
_CELLS = 1 << 18
_BATCH_PIXELS = 1 << 22
_FLATTEST = 1e-6
"""Least variance of a component relative to the first: weaker ones are not scaled up to 1."""


def images_within(pixels: int, sizes: Sequence[Size], most: int, least: int = 16) -> int:
    """Say how many images of these sizes have about ``pixels`` pixels: ``least`` to ``most``."""
    mean = sum(height * width for height, width in sizes) / max(1, len(sizes))
    return max(least, min(most, int(pixels / mean)))


def image_limit(sizes: Sequence[Size]) -> int:
    """Say how many images a PCA reads, of a set of these sizes."""
    return images_within(_PIXELS, sizes, _IMAGES)


def image_batch(sizes: Sequence[Size]) -> int:
    """Say how many images of these sizes are held at once."""
    return images_within(_BATCH_PIXELS, sizes, 64, least=1)


def memory_need(sizes: Sequence[Size], channels: int, cell: int) -> int:
    """Estimate the bytes of main memory that a PCA of images of these sizes takes."""
    pixels = image_batch(sizes) * max(height * width for height, width in sizes)
    values = channels * cell**2
    # Bytes, floats and cells of a batch; sums, covariance and its axes in float64.
    return pixels * channels * (1 + 4 + 4 + 4) + 6 * 8 * values**2


@torch.no_grad()
def fit_pca(
    images: Iterable[Tensor], cell: int, components: int, cells: int, lapped: bool
) -> dict[str, Tensor]:
    """Fit the PCA of cells of cell×cell pixels, in batches of images [B, C, H, W].

    ``cells`` is about how many there are; of more than _CELLS, random ones are used, the same
    whenever it is called. With ``lapped``, colours are mixed across the borders of cells before.
    Returns the weights and biases of the linear layers ``to_code`` and ``from_code``, by name.
    Components have variance 1, and their largest element is positive. With more components than
    values, they are spread evenly over the components (a tight frame), which averages noise on
    them. Raises InputError when there are too few cells, or when all are the same.
    """
    every = max(1, round(cells / _CELLS))
    count, mean, square = 0, torch.zeros(()), torch.zeros(())
    for number, batch in enumerate(images):
        size: Size = (batch.shape[2], batch.shape[3])
        lattice = on_lattice(batch.float().cpu(), size, cell)
        values = to_cells(lap(lattice, cell) if lapped else lattice, cell).flatten(0, 2)
        if every > 1:
            # One of each run of cells, at a random place in it: at the same place in all of them,
            # only some columns of the grid would be used.
            starts = torch.arange(0, len(values), every)
            places = starts + rng.bits(rng.fold(number), len(starts)) % every
            values = values[places.clamp(max=len(values) - 1)]
        count += len(values)
        mean = mean + values.double().sum(0)
        square = square + (values.T @ values).double()
    if count <= components:
        raise InputError(
            f"riae.latent_channels = {components}: a principal component analysis needs more cells "
            f"than that, and the training images have {count}; start = 'random' needs none"
        )
    mean = mean / count
    covariance = square / count - torch.outer(mean, mean)
    if not torch.isfinite(covariance).all():
        raise InputError("the training images hold values that are not finite")
    variances, axes = (part.flip(-1) for part in torch.linalg.eigh(covariance))
    if variances[0] < 1e-8:
        raise InputError(
            "the training images are all of one colour: no principal component analysis to start "
            "from; start = 'random' needs none"
        )
    kept = min(components, len(mean))
    variances, axes = variances[:kept], axes[:, :kept]
    scales = variances.clamp(min=_FLATTEST * float(variances[0])).sqrt()
    # The largest weight is positive; of several that are equal as they are stored, the first one.
    stored = (axes * scales).float()
    largest = stored.gather(0, stored.abs().argmax(0, keepdim=True))
    axes = axes * torch.where(largest < 0, -1.0, 1.0)
    encode, decode = (axes / scales).T, axes * scales
    if components > kept:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(components, kept, generator=generator, dtype=torch.float64)
        frame = torch.linalg.qr(drawn).Q * (components / kept) ** 0.5
        encode, decode = frame @ encode, decode @ frame.T * (kept / components)
    return {
        "to_code.weight": encode.float(),
        "to_code.bias": -(encode @ mean).float(),
        "from_code.weight": decode.float(),
        "from_code.bias": mean.float(),
    }


def start_from_pca(model: RIAE, weights: dict[str, Tensor]) -> None:
    """Set the linear layers of a model to weights of fit_pca."""
    model.load_state_dict(weights, strict=False)
