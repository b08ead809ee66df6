"""Which pixels, points and latent cells of RIAE attend to which.

One object decides it for the encoder (cells attend to pixels), the decoder (points attend to
cells), the blocks on the latent grid, and the random choices of a training step. It also makes the
features that describe places to the network, because these depend on how far attention looks:

* ``cloud``: all attend to all, and places are Fourier features of the whole image. A training step
  chooses random clouds of pixels and of latents instead of all.
* ``tiled``: what lies in a tile of cells attends to what lies in the tile and in a halo around it
  (r2id.models.tiles). Places are features in cells, which are the same in a window of an image as
  in the image. Cost grows linearly with the pixels. At least one tile with its halo is computed at
  once, so a grid of few cells over a large image takes much memory.

To add a kind, write a subclass of Visibility, add it to VISIBILITIES and add its name to
RiaeConfig.attention in r2id/config/models.py. Shapes in it must not depend on the values of tensors
(no ``nonzero``, ``item`` or boolean index), see r2id.models.tracing.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · N pixels that the encoder
sees · M = h·w latents · P points that the decoder renders · D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.attention import as_on_gpu
from r2id.models.coords import WHOLE, Part, Size
from r2id.models.tiles import Tiles, rectangles

# How much is computed at once outside training, so that memory does not grow with the work.
_ENCODE_CHUNK = 1 << 19  # cloud: pixels that are encoded, at least one image
_DECODE_CHUNK = 1 << 13  # cloud: points that are decoded
_TILES_CHUNK = 1 << 13  # tiled: pixels that are encoded or decoded
_GPU_FACTOR = 8
"""How many times as many pixels or points a GPU takes at once, in fewer kernels: 6 to 7 kB each in
configs/mnist/published-riae.toml. On a CPU they should fit into its cache."""


def _at_once(chunk: int, device: torch.device) -> int:
    return _GPU_FACTOR * chunk if as_on_gpu(device) else chunk


EncodeFn = Callable[[Tensor, Tensor, Size, Tensor, Size, Tiles | None], Tensor]
"""(colours [B, N, C], points [1, N, 4], image size, cells [1, M, 4], grid, tiles) → [B, M, D]: how
cells gather colours, as AttentionEncoder does."""
DecodeFn = Callable[[Tensor, Tensor, Tensor, Size, Size, Tiles | None], Tensor]
"""(kv [B, M, D], cells [1, M, 4], points [1, P, 4], image size, grid, tiles) → colours [B, P, C]:
how points are rendered, as in AttentionDecoder.decode_points."""


@dataclass(frozen=True)
class DecoderPixels:
    """Pixels that the decoder renders in a training step."""

    pixels: Tensor
    """Their indices, row by row: int64 [B, P]; in tile order where there are tiles."""
    tiles: Tiles | None = None
    """The tiles that they make up; None where all points see the same latents."""
    weight: Tensor | None = None
    """Weights of their errors [B, P, 1], with which the mean error is an unbiased estimate of the
    mean over the whole image; None: all are 1."""


@dataclass(frozen=True)
class Subsets:
    """Random subsets of a training step, as (total, count) each; None: all are taken."""

    encoder: tuple[int, int] | None
    """Of the pixels that the encoder sees."""
    decoder: tuple[int, int]
    """Of the pixels that the decoder renders, or of their tiles."""
    latents: tuple[int, int] | None
    """Of the latents that the decoder sees."""


class Visibility(ABC):
    """Decides what attends to what, and describes places to the network."""

    is_local: ClassVar[bool]
    """Whether what attends sees only what is near it, which ``tiles`` says."""

    def __init__(self, config: RiaeConfig) -> None:
        self.config = config

    @property
    @abstractmethod
    def cell_dim(self) -> int:
        """Length of cell_features."""

    @property
    def point_dim(self) -> int:
        """Length of point_features."""
        return self.cell_dim + 2 * self.config.condition_on_pixel_size

    @abstractmethod
    def cell_features(self, points: Tensor, grid: Size) -> Tensor:
        """Make features of the places of cells, or of any points: [..., 4] → [..., cell_dim]."""

    def point_features(self, points: Tensor, size: Size, grid: Size) -> Tensor:
        """Make features of an image's points, of place and pixel size: [..., 4] → [..., point_dim].

        ``size`` is the image's (H, W); the size of its pixels is in them if the config says so.
        """
        features = self.cell_features(points, grid)
        if not self.config.condition_on_pixel_size:
            return features
        return torch.cat([features, coords.pixel_size(points, size, grid)], dim=-1)

    def tiles(
        self,
        queries: Size,
        keys: Size,
        grid: Size,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles | None:
        """Build tiles for a query grid (or a part of it) attending to a key grid over one image.

        ``grid`` is the latent grid, of whose cells tiles are made. None where all attend to all.
        """
        return None

    def latent_tiles(self, grid: Size, device: torch.device) -> Tiles | None:
        """Build tiles in which the cells of a latent grid attend to each other, or None for all."""
        return None

    @abstractmethod
    def encode(self, look: EncodeFn, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Gather images [B, C, H, W] in all cells [1, M, 4] by calls of ``look``: [B, M, D]."""

    @abstractmethod
    def decode(
        self, draw: DecodeFn, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        """Render a part of an image (H, W) from kv [B, M, D] by calls of ``draw``: [B, C, h', w'].

        h' and w' are the part's rows and columns.
        """

    @abstractmethod
    def images_encoded_at_once(self, pixels: int, device: torch.device) -> int:
        """Say how many images of this many pixels go into one call of ``encode``."""

    @abstractmethod
    def images_decoded_at_once(self, pixels: int, batch: int, device: torch.device) -> int:
        """Say how many images of a batch, of this many pixels, go into one call of ``decode``."""

    @abstractmethod
    def subsets(self, wanted: Subsets, size: Size, grid: Size, device: torch.device) -> Subsets:
        """Say which subsets a training step draws, where all attend to all in those ``wanted``.

        ``size`` is the (H, W) of the image that the decoder renders.
        """

    @abstractmethod
    def decoder_pixels(self, chosen: Tensor, size: Size, grid: Size) -> DecoderPixels:
        """Make the pixels that the decoder renders of the subset [B, N] that was drawn for it."""


class Cloud(Visibility):
    """All attend to all; in training, to random clouds."""

    is_local = False

    @property
    def cell_dim(self) -> int:
        return coords.fourier_dim(self.config.fourier)

    @property
    def point_dim(self) -> int:
        return super().point_dim + coords.PHASE_DIM

    def cell_features(self, points: Tensor, grid: Size) -> Tensor:
        return coords.fourier_features(points, self.config.fourier)

    def point_features(self, points: Tensor, size: Size, grid: Size) -> Tensor:
        features = [self.cell_features(points, grid), coords.cell_phase(points, grid)]
        if self.config.condition_on_pixel_size:
            features.append(coords.pixel_size(points, size, grid))
        return torch.cat(features, dim=-1)

    def encode(self, look: EncodeFn, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        size: Size = (images.shape[2], images.shape[3])
        points = coords.grid_coordinates(size, grid, images.device).unsqueeze(0)
        return look(rearrange(images, "b c h w -> b (h w) c"), points, size, cells, grid, None)

    def decode(
        self, draw: DecodeFn, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        points = coords.grid_coordinates(size, grid, kv.device, part).unsqueeze(0)
        most = _at_once(_DECODE_CHUNK, kv.device)
        chunks = points.split(max(1, most // len(kv)), dim=1)
        colours = torch.cat([draw(kv, cells, chunk, size, grid, None) for chunk in chunks], dim=1)
        return rearrange(colours, "b (h w) c -> b c h w", h=part[0].stop - part[0].start)

    def images_encoded_at_once(self, pixels: int, device: torch.device) -> int:
        return max(1, _ENCODE_CHUNK // pixels)

    def images_decoded_at_once(self, pixels: int, batch: int, device: torch.device) -> int:
        return batch  # points are drawn in chunks already

    def subsets(self, wanted: Subsets, size: Size, grid: Size, device: torch.device) -> Subsets:
        return wanted

    def decoder_pixels(self, chosen: Tensor, size: Size, grid: Size) -> DecoderPixels:
        return DecoderPixels(chosen)


class Tiled(Visibility):
    """What lies in a tile attends to what lies in the tile and in its halo."""

    is_local = True

    @property
    def cell_dim(self) -> int:
        return coords.cell_dim(self.config.cell_fourier)

    def cell_features(self, points: Tensor, grid: Size) -> Tensor:
        return coords.cell_features(points, grid, self.config.cell_fourier)

    def tiles(
        self,
        queries: Size,
        keys: Size,
        grid: Size,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles:
        return Tiles.between(queries, keys, grid, self.config.tile, self.config.halo, part, device)

    def latent_tiles(self, grid: Size, device: torch.device) -> Tiles | None:
        if self.config.latent_attention == "global":
            return None
        return self.tiles(grid, grid, grid, device=device)

    def encode(self, look: EncodeFn, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        size: Size = (images.shape[2], images.shape[3])
        # As many cells as lie over _TILES_CHUNK pixels, or those of a GPU, of all images together.
        most = max(
            1, _at_once(_TILES_CHUNK, images.device) * grid[0] * grid[1] // images[:, 0].numel()
        )
        values = images.new_empty(0)  # allocated once the first call tells width and dtype
        for rows, columns in rectangles(grid, grid, self.config.tile, most):
            tiles = self.tiles(grid, size, grid, (rows, columns), images.device)
            y, x = tiles.part
            points = coords.grid_coordinates(size, grid, images.device, tiles.part)
            queries = coords.grid_coordinates(grid, device=images.device, part=(rows, columns))
            colours = rearrange(images[:, :, y, x], "b c h w -> b (h w) c")
            gathered = look(colours, points.unsqueeze(0), size, queries.unsqueeze(0), grid, tiles)
            if not len(values):
                values = images.new_empty(len(images), *grid, gathered.shape[-1])
            height = rows.stop - rows.start
            values[:, rows, columns] = rearrange(gathered, "b (h w) d -> b h w d", h=height)
        return rearrange(values, "b h w d -> b (h w) d")

    def decode(
        self, draw: DecodeFn, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        by_cell = [rearrange(x, "b (h w) d -> b h w d", h=grid[0]) for x in (kv, cells)]
        top, left = (side.start for side in part)
        image = kv.new_empty(0)  # allocated once the first call tells channels and dtype
        most = max(1, _at_once(_TILES_CHUNK, kv.device) // len(kv))
        for rows, columns in rectangles(size, grid, self.config.tile, most, part):
            tiles = self.tiles(size, grid, grid, (rows, columns), kv.device)
            y, x = tiles.part
            near_kv, near_cells = (values[:, y, x].flatten(1, 2) for values in by_cell)
            points = tiles.to_tile_order(
                coords.grid_coordinates(size, grid, kv.device, (rows, columns)).unsqueeze(0)
            )
            colours = tiles.from_tile_order(draw(near_kv, near_cells, points, size, grid, tiles))
            if not len(image):
                sides = (side.stop - side.start for side in part)
                image = colours.new_empty(len(kv), colours.shape[-1], *sides)
            band = image[:, :, rows.start - top : rows.stop - top]
            band[..., columns.start - left : columns.stop - left] = rearrange(
                colours, "b (h w) c -> b c h w", h=rows.stop - rows.start
            )
        return image

    def images_encoded_at_once(self, pixels: int, device: torch.device) -> int:
        return max(1, _at_once(_TILES_CHUNK, device) // pixels)

    def images_decoded_at_once(self, pixels: int, batch: int, device: torch.device) -> int:
        return max(1, _at_once(_TILES_CHUNK, device) // pixels)

    def subsets(self, wanted: Subsets, size: Size, grid: Size, device: torch.device) -> Subsets:
        """Draw tiles for the decoder alone; a tile sees few pixels and latents already."""
        tiles = self.tiles(size, grid, grid, device=device).queries.shape[1]
        pixels, count = wanted.decoder
        return Subsets(None, (tiles, max(1, round(count * tiles / pixels))), None)

    def decoder_pixels(self, chosen: Tensor, size: Size, grid: Size) -> DecoderPixels:
        """Take the pixels of the chosen tiles; padding has weight 0."""
        tiles = self.tiles(size, grid, grid, device=chosen.device)
        total = tiles.queries.shape[1]
        tiles = tiles.choose(chosen)
        # Tiles at the edges have fewer pixels than others and are drawn as often. The mean over
        # all slots, padding included, times the slots per pixel of the whole image is a mean over
        # pixels.
        weight = tiles.query_mask.flatten(1).unsqueeze(-1) * (
            total * tiles.queries.shape[2] / (size[0] * size[1])
        )
        return DecoderPixels(tiles.queries.flatten(1), tiles, weight)


VISIBILITIES: dict[str, type[Visibility]] = {"cloud": Cloud, "tiled": Tiled}
"""Value of ``riae.attention`` → class."""
