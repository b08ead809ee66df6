"""The codec of an R2ID that diffuses pixels: the image is its own latent grid, one cell per pixel.

Shape letters: B batch · C colours · H, W image · h, w grid.
"""

from __future__ import annotations

from torch import Tensor, nn

from r2id.images import resize
from r2id.models.coords import OnProgress, Size, Window, part_of

DOWNSAMPLE = 1.0
"""Side of a cell in pixels."""
STD = 0.5
"""Standard deviation that pixels in [−1, 1] are taken to have: σ_data of Karras et al. 2022."""


class Pixels(nn.Module):
    """Takes an RIAE's place: has no weights, and resizes images to other grids and sizes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def grid_for(self, image: Size) -> Size:
        """Return the image's own size."""
        return image

    def encode(
        self, images: Tensor, native: Size | None = None, advance: OnProgress | None = None
    ) -> Tensor:
        """Resize images [B, C, H, W] to a size, by default their own → [B, C, h, w]."""
        return resize(images, native or (images.shape[2], images.shape[3]))

    def decode(
        self,
        latents: Tensor,
        size: Size,
        window: Window | None = None,
        native: Size | None = None,
        advance: OnProgress | None = None,
    ) -> Tensor:
        """Resize [B, C, h, w] to ``size`` → [B, C, H, W], or cut a window of that out of it."""
        rows, columns = part_of(size, window)
        return resize(latents, size)[:, :, rows, columns]
