"""No autoencoder: the image is its own latent grid, one cell per pixel, so that R2ID diffuses
pixels.

Shape letters: B batch · C colours · H, W image · h, w grid.
"""

from __future__ import annotations

from torch import Tensor, nn

from r2id.images import resize
from r2id.models.coords import Size, Window, part_of

DOWNSAMPLE = 1.0
"""Pixels per cell's side."""
STD = 0.5
"""What pixels are divided by to be diffused: σ_data of Karras et al. 2022."""


class Pixels(nn.Module):
    """In an RIAE's place: has no weights, and resizes where another grid or size is asked for."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def grid_for(self, image: Size) -> Size:
        """The image's own size."""
        return image

    def encode(self, images: Tensor, grid: Size | None = None) -> Tensor:
        """[B, C, H, W] in [−1, 1] → [B, C, h, w]."""
        return resize(images, grid or (images.shape[2], images.shape[3]))

    def decode(self, latents: Tensor, size: Size, window: Window | None = None) -> Tensor:
        """[B, C, h, w] → [B, C, *size], or the window (y0, x0, y1, x1) of that."""
        rows, columns = part_of(size, window)
        return resize(latents, size)[:, :, rows, columns]
