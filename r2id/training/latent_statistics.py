"""The mean and standard deviation of an RIAE's latents, which diffusion normalises them with.

Shape letters: B batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from torch import Tensor


def latent_statistics(
    encode: Callable[[Tensor], Tensor], batches: Iterable[Tensor]
) -> dict[str, Tensor]:
    """Measure the mean and standard deviation of each channel of encode(images), over all cells.

    Returns {"mean": [L], "std": [L]}. Sums are float64. A channel that never varies gets the
    standard deviation 1, so that normalising does not divide by zero.
    """
    total = squares = torch.zeros((), dtype=torch.float64)
    count = 0
    for images in batches:
        latents = rearrange(encode(images), "b l h w -> l (b h w)").double().cpu()
        total, squares = total + latents.sum(1), squares + latents.square().sum(1)
        count += latents.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt()
    return {"mean": mean.float(), "std": torch.where(std > 1e-6, std, 1.0).float()}
