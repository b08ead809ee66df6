"""The codes that autoencoders.py compares: how each maps images to latents and back.

A code maps images [B, C, H, W] in [−1, 1] to latents [B, L, h, w] and back. All have the same cells
and channels. How they are trained is in autoencoder_training.py.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from r2id.config.models import lattice_grid
from r2id.errors import InputError
from r2id.images import resize
from r2id.models.cells import on_lattice, to_cells, to_points
from r2id.models.coords import Size
from r2id.models.lapped import lap, unlap
from r2id.models.riae import RIAE


class Code:
    """A trained code. Images that it returns are clipped to [−1, 1]."""

    parameters = 0

    def encode(self, images: Tensor) -> Tensor:
        """Encode images [B, C, H, W] → [B, L, h, w]."""
        raise NotImplementedError

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        """Decode latents at the size of the images that were encoded."""
        raise NotImplementedError

    def decode_at(self, latents: Tensor, size: Size, own: Size) -> Tensor:
        """Decode latents of images of size ``own`` at another size: here by bicubic resizing."""
        return resize(self.decode(latents, own), size).clamp(-1, 1)

    def run_at(self, latents: Tensor, size: Size, own: Size) -> Tensor | None:
        """Run the decoder's network on resized latents, if it can make that size so."""
        return None


class Linear(Code):
    """PCA of the pixels of each cell, lapped or not; other sizes by bicubic resizing."""

    def __init__(self, weights: dict[str, Tensor], cell: int, lapped: bool) -> None:
        self.weights, self.cell, self.lapped = weights, cell, lapped
        self.parameters = sum(part.numel() for part in weights.values())

    def encode(self, images: Tensor) -> Tensor:
        points = on_lattice(images, own_size(images), self.cell)
        cells = to_cells(lap(points, self.cell) if self.lapped else points, self.cell)
        code = F.linear(cells, self.weights["to_code.weight"], self.weights["to_code.bias"])
        return code.movedim(-1, 1)

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        code = latents.movedim(1, -1)
        cells = F.linear(code, self.weights["from_code.weight"], self.weights["from_code.bias"])
        points = to_points(cells, self.cell)
        images = unlap(points, self.cell) if self.lapped else points
        return images[:, :, : own[0], : own[1]].clamp(-1, 1)


class Riae(Code):
    """An RIAE of either kind."""

    def __init__(self, model: RIAE, bfloat16: bool) -> None:
        self.model, self.bfloat16 = model.eval(), bfloat16
        self.parameters = count(model)

    def encode(self, images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.model.encode(images)

    def decode(self, latents: Tensor, own: Size) -> Tensor:
        return self.decode_at(latents, own, own)

    def decode_at(self, latents: Tensor, size: Size, own: Size) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            return self.model.decode(latents, size, native=own).float().clamp(-1, 1)


class Convolutional(Code):
    """A convolutional autoencoder; images that are no multiple of the cell are filled up to one."""

    def __init__(self, model: ConvolutionalModel, cell: int) -> None:
        self.model, self.cell = model.eval(), cell
        self.parameters = count(model)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        return self.model.to_latents(on_lattice(images, own_size(images), self.cell))

    @torch.no_grad()
    def decode(self, latents: Tensor, own: Size) -> Tensor:
        return self.model.to_images(latents)[:, :, : own[0], : own[1]].clamp(-1, 1)

    def run_at(self, latents: Tensor, size: Size, own: Size) -> Tensor | None:
        if any(side % self.cell for side in (*size, *own)):
            return None
        return self.decode(resize(latents, lattice_grid(size, self.cell)), size)


class ConvolutionalModel(nn.Module):
    """What the two convolutional autoencoders have in common."""

    step: ClassVar[int]
    """Of which numbers a width may be a multiple."""

    def to_latents(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def to_images(self, latents: Tensor) -> Tensor:
        raise NotImplementedError


class KlModel(ConvolutionalModel):
    """AutoencoderKL of diffusers, as it is, with one block per level; its mode is the code."""

    step = 8  # groups of its norms

    def __init__(self, width: int, channels: int, latents: int, cell: int) -> None:
        super().__init__()
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise InputError(f"kl: needs diffusers (pip install 'r2id[bench]'): {error}") from None
        levels = 1 + int(math.log2(cell))
        self.inner = AutoencoderKL(
            in_channels=channels,
            out_channels=channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(width * min(4, 2**level) for level in range(levels)),
            layers_per_block=1,
            norm_num_groups=8,
            latent_channels=latents,
        )

    def to_latents(self, images: Tensor) -> Tensor:
        return self.inner.encode(by_pixels(images)).latent_dist.mode()

    def to_images(self, latents: Tensor) -> Tensor:
        return self.inner.decode(by_pixels(latents)).sample


class _Residual(nn.Sequential):
    def __init__(self, width: int) -> None:
        super().__init__(
            nn.GroupNorm(1, width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PlainModel(ConvolutionalModel):
    """Strided convolutions and residual blocks, and the same back by pixel shuffle.

    All blocks are on small grids, so that a step is fast on a CPU.
    """

    step = 2

    def __init__(self, width: int, channels: int, latents: int, cell: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(1 + int(math.log2(cell)))]
        down: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        up: list[nn.Module] = []
        for fine, coarse in pairwise(widths):
            down += [nn.GELU(), nn.Conv2d(fine, coarse, 4, 2, 1), _Residual(coarse)]
            up = [
                _Residual(coarse),
                nn.Conv2d(coarse, 4 * fine, 3, padding=1),
                nn.PixelShuffle(2),
                nn.GELU(),
                *up,
            ]
        self.down = nn.Sequential(*down, nn.Conv2d(widths[-1], latents, 1))
        self.up = nn.Sequential(
            nn.Conv2d(latents, widths[-1], 1), *up, nn.Conv2d(width, channels, 3, padding=1)
        )

    def to_latents(self, images: Tensor) -> Tensor:
        return self.down(by_pixels(images))

    def to_images(self, latents: Tensor) -> Tensor:
        return self.up(by_pixels(latents))


def own_size(images: Tensor) -> Size:
    return images.shape[2], images.shape[3]


def count(model: nn.Module) -> int:
    return sum(part.numel() for part in model.parameters())


def by_pixels(images: Tensor) -> Tensor:
    """Lay images out pixel by pixel, for which convolutions are faster."""
    return images.contiguous(memory_format=torch.channels_last)
