"""RIAE: an autoencoder that sees points with coordinates instead of a pixel grid.

To encode, the cells of a latent grid of any size query the image's pixels (r2id.models.encoder). To
decode, points anywhere, such as those of a pixel grid of any size, query the latents
(r2id.models.decoder). Both know places by coordinates alone. What attends to what is decided by
r2id.models.visibility, for both and for the loss.

The aspect ratio of the picture is that of the latent grid: relative coordinates of cells and points
alike take the grid's shape, so that 7×7 latents decoded at 42×28 are a square picture, stretched.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels · N
pixels that the encoder sees · M = h·w latents · P points that the decoder renders · D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from r2id.checkpoints import pretrained
from r2id.config import RiaeConfig
from r2id.models.coords import Size, Window
from r2id.models.decoder import DECODERS
from r2id.models.encoder import ENCODERS
from r2id.models.tiles import Tiles
from r2id.models.visibility import VISIBILITIES


class RIAE(nn.Module):
    """An encoder and a decoder of one kind, and what they have in common."""

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.visibility = VISIBILITIES[config.attention](config)
        encoder = ENCODERS[config.kind](config, channels, self.visibility)
        decoder = DECODERS[config.kind](config, channels, self.visibility)
        # Checkpoints, optimizer states and averages name layers without "encoder." and "decoder."
        # in front. So the layers are registered here, under those names, and the two parts that own
        # them are kept in a tuple, where PyTorch does not look for modules.
        self.parts = (encoder, decoder)
        for part in self.parts:
            for name, layer in part.named_children():
                self.add_module(part.stored_as.get(name, name), layer)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> RIAE:
        """Load a trained model from a file that ``r2id checkpoint export`` wrote.

        It is float32, on the CPU, ready for inference. r2id.checkpoints.pretrained.read returns the
        rest of the file too, such as the statistics of the latents. Raises InputError when there is
        no such file, or it is damaged or holds another model.
        """
        exported = pretrained.read(Path(path), "riae")
        return exported.fill(cls(exported.section("riae", RiaeConfig), exported.facts["channels"]))

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [block for part in self.parts for block in part.blocks()]

    def grid_for(self, image: Size) -> Size:
        """Latent grid (h, w) of an image (H, W): a cell per ``config.downsample`` pixels of a side.

        At least one cell each way.
        """
        height, width = (max(1, round(side / self.config.downsample)) for side in image)
        return height, width

    @torch.no_grad()
    def encode(self, image: Tensor, grid: Size | None = None) -> Tensor:
        """Encode images [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w].

        On any grid; by default on grid_for(their size).
        """
        size: Size = (image.shape[2], image.shape[3])
        return self.parts[0].encode(image, grid or self.grid_for(size))

    @torch.no_grad()
    def decode(self, latents: Tensor, size: Size, window: Window | None = None) -> Tensor:
        """Decode raw latents [B, L, h, w] → images [B, C, H, W] of any size.

        They are nominally in [−1, 1], but not clipped. With a window (y0, x0, y1, x1), only its
        pixels are rendered: [B, C, y1 − y0, x1 − x0]. Pixels that are larger than any in training
        are means of several points (points_per_pixel). Raises InputError when the window is not
        within the image.
        """
        return self.parts[1].decode(latents, size, window)

    def points_per_pixel(self, grid: Size, size: Size) -> Size:
        """Say of how many points, down and across, a pixel of an image (H, W) is the mean."""
        return self.parts[1].points_per_pixel(grid, size)

    def encode_points(
        self,
        colours: Tensor,
        points: Tensor,
        size: Size,
        cells: Tensor,
        grid: Size,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Encode points of images, differentiably; see AttentionEncoder.encode_points."""
        return self.parts[0].encode_points(colours, points, size, cells, grid, tiles)

    def spread_latents(self, latents: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Make what points attend to, [B, M, D]; see AttentionDecoder.spread_latents."""
        return self.parts[1].spread_latents(latents, cells, grid)

    def decode_points(
        self,
        kv: Tensor,
        cells: Tensor,
        points: Tensor,
        size: Size,
        grid: Size,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Decode points of images, differentiably; see AttentionDecoder.decode_points."""
        return self.parts[1].decode_points(kv, cells, points, size, grid, tiles)
