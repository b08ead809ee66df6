"""Losses of colours.

To add one, write a function from differences of colours to losses of the same shape, add it to
PIXEL_LOSSES and add its name to PixelLoss in r2id/config/losses.py. ``loss.pixel`` then takes it.
Its test is a line in tests/training/test_pixel_losses.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from r2id.config.losses import PixelLoss


def charbonnier(error: Tensor) -> Tensor:
    """√(e² + 10⁻⁶) (Lai et al. 2017): the absolute error, smooth at 0."""
    return (error.square() + 1e-6).sqrt()


PIXEL_LOSSES: dict[PixelLoss, Callable[[Tensor], Tensor]] = {
    "l1": torch.abs,
    "mse": torch.square,
    "charbonnier": charbonnier,
}


def reconstruction_loss(decoded: Tensor, truth: Tensor, kind: PixelLoss) -> Tensor:
    """Mean loss of decoded colours against true ones, of one shape."""
    return PIXEL_LOSSES[kind](decoded - truth).mean()
