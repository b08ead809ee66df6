"""Who sees whom between an image's points and the cells of its latent grid.

One object knows it, for the encoder (cells see pixels), the decoder (points see cells), their
blocks on the latent grid, and for what a training step draws. With it goes how places are described
to the network, since that has to suit what is seen:

* ``cloud``: all see all, and places are Fourier features of the whole image. Training shows random
  clouds of pixels and of latents instead.
* ``tiled``: who lies in a tile of cells sees what lies in it and in a halo around it
  (r2id.models.tiles). Places are features of cells, the same in a window of an image as in the
  image, and cost grows linearly with the pixels. The smallest thing that is encoded at once is the
  surroundings of one tile; a grid of few cells over a large image takes memory accordingly.

To add a kind, write a subclass of Visibility, add it to VISIBILITIES and add its name to
RiaeConfig.attention in r2id/config/models.py. Shapes in it must not depend on the values of tensors
(no ``nonzero``, ``item`` or boolean index), see r2id.models.tracing.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · N pixels seen · M = h·w
latents · P points asked for · D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from r2id import rng
from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.coords import WHOLE, Part, Size
from r2id.models.tiles import Tiles, rectangles

# How much is computed at once outside training, so that memory does not grow with the work.
_ENCODE_CHUNK = 1 << 19  # cloud: pixels encoded, one image at least
_DECODE_CHUNK = 8192  # cloud: points decoded
_TILES_CHUNK = 1 << 13  # tiled: pixels encoded or decoded

Look = Callable[[Tensor, Tensor, Size, Tensor, Size, Tiles | None], Tensor]
"""(colours [B, N, C], their places [1, N, 4], image size, cells [1, M, 4], grid, tiles) →
[B, M, D]."""
Draw = Callable[[Tensor, Tensor, Tensor, Size, Size, Tiles | None], Tensor]
"""(kv [B, M, D], cells [1, M, 4], points [1, P, 4], image size, grid, tiles) → colours
[B, P, C]."""


@dataclass(frozen=True)
class Asked:
    """Pixels that a training step asks the decoder for."""

    pixels: Tensor
    """Their numbers, row by row: int64 [B, P]."""
    tiles: Tiles | None = None
    """Those that they make, in tile order; none where every point sees the same latents."""
    weight: Tensor | None = None
    """[B, P, 1], with which their mean error is, on average, the mean over the whole image."""


class Visibility(ABC):
    """What the network is told of places, and what each place sees."""

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
    def cell_features(self, at: Tensor, grid: Size) -> Tensor:
        """Describe the places of cells, or of any points: [..., 4] → [..., cell_dim]."""

    def point_features(self, at: Tensor, size: Size, grid: Size) -> Tensor:
        """Describe an image's pixels by place and size: [..., 4] → [..., point_dim]."""
        features = self.cell_features(at, grid)
        if not self.config.condition_on_pixel_size:
            return features
        return torch.cat([features, coords.pixel_size(at, size, grid)], dim=-1)

    @abstractmethod
    def tiles(
        self,
        queries: Size,
        keys: Size,
        grid: Size,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles | None:
        """Build tiles for a query grid (or a part of it) attending to a key grid over one image.

        None where all see all.
        """

    @abstractmethod
    def latent_tiles(self, grid: Size, device: torch.device) -> Tiles | None:
        """Tiles in which the cells of a latent grid see each other; none where all see all."""

    @abstractmethod
    def encode(self, look: Look, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Let all cells [1, M, 4] look at all pixels they see of images [B, C, H, W]: [B, M, D]."""

    @abstractmethod
    def decode(
        self, draw: Draw, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        """Draw a part of an image (H, W), a pixel from the kv [B, M, D] it sees: [B, C, h', w']."""

    @abstractmethod
    def images_encoded_at_once(self, pixels: int) -> int:
        """How many images of so many pixels fit into one call of ``encode``."""

    @abstractmethod
    def images_decoded_at_once(self, pixels: int, batch: int) -> int:
        """How many of a batch of images of so many pixels fit into one call of ``decode``."""

    @abstractmethod
    def choose_seen(self, rng_keys: Tensor, pixels: int, count: int) -> Tensor:
        """Choose ``count`` pixels for the encoder to see in a training step: int64 [B, N]."""

    @abstractmethod
    def choose_asked(self, rng_keys: Tensor, size: Size, grid: Size, count: int) -> Asked:
        """Choose ``count`` pixels to ask the decoder for in a training step."""

    @abstractmethod
    def choose_latents(
        self, rng_keys: Tensor, kv: Tensor, cells: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """Choose a share of the latents for the decoder to see in a training step.

        kv [B, M, D], cells [1, M, 4] → those chosen of both, [B, M', D] and [B or 1, M', 4].
        """


class Cloud(Visibility):
    """All see all; in training, random clouds."""

    @property
    def cell_dim(self) -> int:
        return coords.fourier_dim(self.config.fourier)

    @property
    def point_dim(self) -> int:
        return super().point_dim + coords.PHASE_DIM

    def cell_features(self, at: Tensor, grid: Size) -> Tensor:
        return coords.fourier_features(at, self.config.fourier)

    def point_features(self, at: Tensor, size: Size, grid: Size) -> Tensor:
        features = [self.cell_features(at, grid), coords.cell_phase(at, grid)]
        if self.config.condition_on_pixel_size:
            features.append(coords.pixel_size(at, size, grid))
        return torch.cat(features, dim=-1)

    def tiles(
        self,
        queries: Size,
        keys: Size,
        grid: Size,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles | None:
        return None

    def latent_tiles(self, grid: Size, device: torch.device) -> Tiles | None:
        return None

    def encode(self, look: Look, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        size: Size = (images.shape[2], images.shape[3])
        at = coords.grid_coordinates(size, grid, images.device).unsqueeze(0)
        return look(rearrange(images, "b c h w -> b (h w) c"), at, size, cells, grid, None)

    def decode(
        self, draw: Draw, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        at = coords.grid_coordinates(size, grid, kv.device, part).unsqueeze(0)
        chunks = at.split(max(1, _DECODE_CHUNK // len(kv)), dim=1)
        colours = torch.cat([draw(kv, cells, some, size, grid, None) for some in chunks], dim=1)
        return rearrange(colours, "b (h w) c -> b c h w", h=part[0].stop - part[0].start)

    def images_encoded_at_once(self, pixels: int) -> int:
        return max(1, _ENCODE_CHUNK // pixels)

    def images_decoded_at_once(self, pixels: int, batch: int) -> int:
        return batch  # points are drawn in chunks already

    def choose_seen(self, rng_keys: Tensor, pixels: int, count: int) -> Tensor:
        return rng.subset(rng_keys, pixels, min(count, pixels))

    def choose_asked(self, rng_keys: Tensor, size: Size, grid: Size, count: int) -> Asked:
        pixels = size[0] * size[1]
        return Asked(rng.subset(rng_keys, pixels, min(count, pixels)))

    def choose_latents(
        self, rng_keys: Tensor, kv: Tensor, cells: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        if share >= 1:
            return kv, cells
        count = max(1, round(kv.shape[1] * share))
        chosen = rng.subset(rng_keys, kv.shape[1], count)
        index = chosen.unsqueeze(-1).expand(-1, -1, kv.shape[-1])
        return kv.gather(1, index), cells[0][chosen]


class Tiled(Visibility):
    """Who lies in a tile sees what lies in it and in its halo."""

    @property
    def cell_dim(self) -> int:
        return coords.cell_dim(self.config.cell_fourier)

    def cell_features(self, at: Tensor, grid: Size) -> Tensor:
        return coords.cell_features(at, grid, self.config.cell_fourier)

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

    def encode(self, look: Look, images: Tensor, cells: Tensor, grid: Size) -> Tensor:
        size: Size = (images.shape[2], images.shape[3])
        # So many cells have about _TILES_CHUNK pixels.
        most = max(1, _TILES_CHUNK * grid[0] * grid[1] // images[:, 0].numel())
        seen = images.new_empty(0)
        for rows, columns in rectangles(grid, grid, self.config.tile, most):
            tiles = self.tiles(grid, size, grid, (rows, columns), images.device)
            y, x = tiles.part
            at = coords.grid_coordinates(size, grid, images.device, tiles.part)
            some = coords.grid_coordinates(grid, device=images.device, part=(rows, columns))
            colours = rearrange(images[:, :, y, x], "b c h w -> b (h w) c")
            found = look(colours, at.unsqueeze(0), size, some.unsqueeze(0), grid, tiles)
            if not len(seen):
                seen = images.new_empty(len(images), *grid, found.shape[-1])
            height = rows.stop - rows.start
            seen[:, rows, columns] = rearrange(found, "b (h w) d -> b h w d", h=height)
        return rearrange(seen, "b h w d -> b (h w) d")

    def decode(
        self, draw: Draw, kv: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        by_cell = [rearrange(x, "b (h w) d -> b h w d", h=grid[0]) for x in (kv, cells)]
        top, left = (side.start for side in part)
        image = kv.new_empty(0)
        most = max(1, _TILES_CHUNK // len(kv))
        for rows, columns in rectangles(size, grid, self.config.tile, most, part):
            tiles = self.tiles(size, grid, grid, (rows, columns), kv.device)
            y, x = tiles.part
            near_kv, near_cells = (values[:, y, x].flatten(1, 2) for values in by_cell)
            at = tiles.in_order(coords.grid_coordinates(size, grid, kv.device, (rows, columns)))
            colours = tiles.restored(draw(near_kv, near_cells, at, size, grid, tiles))
            if not len(image):
                sides = (side.stop - side.start for side in part)
                image = colours.new_empty(len(kv), colours.shape[-1], *sides)
            into = image[:, :, rows.start - top : rows.stop - top]
            into[..., columns.start - left : columns.stop - left] = rearrange(
                colours, "b (h w) c -> b c h w", h=rows.stop - rows.start
            )
        return image

    def images_encoded_at_once(self, pixels: int) -> int:
        return max(1, _TILES_CHUNK // pixels)

    def images_decoded_at_once(self, pixels: int, batch: int) -> int:
        return max(1, _TILES_CHUNK // pixels)

    def choose_seen(self, rng_keys: Tensor, pixels: int, count: int) -> Tensor:
        """All of them: which ones a tile sees follows from places."""
        return torch.arange(pixels, device=rng_keys.device).expand(len(rng_keys), -1)

    def choose_asked(self, rng_keys: Tensor, size: Size, grid: Size, count: int) -> Asked:
        """Random tiles of about ``count`` pixels, surplus ones with weight 0."""
        tiles = self.tiles(size, grid, grid, device=rng_keys.device)
        total, pixels = tiles.queries.shape[1], size[0] * size[1]
        some = min(total, max(1, round(count * total / pixels)))
        tiles = tiles.chosen(rng.subset(rng_keys, total, some))
        # Tiles at the edges have fewer pixels than others and are drawn as often: a mean over all
        # slots, surplus included, times slots per pixel is a mean over pixels.
        weight = tiles.asked.flatten(1).unsqueeze(-1) * (total * tiles.queries.shape[2] / pixels)
        return Asked(tiles.queries.flatten(1), tiles, weight)

    def choose_latents(
        self, rng_keys: Tensor, kv: Tensor, cells: Tensor, share: float
    ) -> tuple[Tensor, Tensor]:
        """All of them: a tile sees few already."""
        return kv, cells


VISIBILITIES: dict[str, type[Visibility]] = {"cloud": Cloud, "tiled": Tiled}
"""By ``riae.attention``."""
