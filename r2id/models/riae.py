"""RIAE: an autoencoder that sees points with coordinates instead of a pixel grid.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels · N pixels seen · M = h·w latents
· P points asked for · D width.

Encoding: a latent grid of any size starts as coordinates only and queries the image's pixels. Decoding: points anywhere,
a pixel grid of any size among them, start as coordinates only and query the latents. The latent grid owns the picture's
aspect ratio: relative coordinates of cells and points alike take its shape, so that decoding 7×7 latents at 42×28 renders
a square picture stretched.

With ``tiled`` attention a query sees what lies near it, in latent cells (r2id.models.tiles), and places are features of
cells rather than of the whole image: a model sees the same in a window of an image as in the image, and nothing but the
blocks of the latent grid, where they are global, costs more than its share of the pixels. The smallest thing encoded at
once is the surroundings of one tile; a grid of few cells over a large image takes memory accordingly.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id.checkpoints import pretrained
from r2id.config import RiaeConfig
from r2id.models import coords
from r2id.models.attention import RMSNorm
from r2id.models.coords import WHOLE, Part, Size, Window
from r2id.models.layers import CrossBlock, SelfBlock, zero_linear
from r2id.models.tiles import Tiles, rectangles

_ENCODE_CHUNK = (
    1 << 19
)  # pixels encoded at once outside training, one image at least: memory does not grow with the batch
_DECODE_CHUNK = (
    8192  # points decoded at once outside training: memory does not grow with the output
)
_BAND = 1 << 18  # points, of which pixels are the means, held at once, one row of pixels at least
_TILES_CHUNK = (
    1 << 13
)  # pixels encoded or decoded at once with tiled attention: memory grows with neither


class RIAE(nn.Module):
    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.tiled = config.attention == "tiled"
        features = (
            coords.cell_dim(config.cell_fourier)
            if self.tiled
            else coords.fourier_dim(config.fourier)
        )
        place = (
            features + (0 if self.tiled else coords.PHASE_DIM) + 2 * config.condition_on_pixel_size
        )
        pixel_heads = max(1, config.heads * config.pixel_width // config.width)

        def latent_stack() -> nn.ModuleList:
            return nn.ModuleList(
                SelfBlock(config.width, config.heads, config.ffn_ratio, config.gaussian_window)
                for _ in range(config.latent_blocks)
            )

        self.pixel_in = nn.Sequential(
            nn.Linear(channels + place, config.pixel_width),
            nn.SiLU(),
            nn.Linear(config.pixel_width, config.pixel_width),
        )
        self.cell_in = nn.Linear(features, config.width)
        self.encoder = nn.ModuleList(
            CrossBlock(
                config.width,
                config.pixel_width,
                config.heads,
                config.ffn_ratio,
                config.gaussian_window,
            )
            for _ in range(config.encoder_blocks)
        )
        self.encoder_latent = latent_stack()
        self.to_latent = nn.Sequential(
            RMSNorm(config.width), nn.Linear(config.width, config.latent_channels)
        )

        self.latent_in = nn.Linear(config.latent_channels + features, config.width)
        self.decoder_latent = latent_stack()
        self.point_in = nn.Sequential(
            nn.Linear(place, config.pixel_width),
            nn.SiLU(),
            nn.Linear(config.pixel_width, config.pixel_width),
        )
        self.decoder = nn.ModuleList(
            CrossBlock(
                config.pixel_width,
                config.width,
                pixel_heads,
                config.ffn_ratio,
                config.gaussian_window,
            )
            for _ in range(config.decoder_blocks)
        )
        self.to_colour = nn.Sequential(
            RMSNorm(config.pixel_width), zero_linear(config.pixel_width, channels)
        )

    @classmethod
    def from_pretrained(cls, path: str | Path) -> RIAE:
        """A trained model from a file that ``r2id checkpoint export`` wrote: float32, on the CPU, ready for inference.

        InputError when the file is none, is damaged or holds another model. r2id.checkpoints.pretrained.read also gives what
        else the file says, the latents' statistics among it.
        """
        found = pretrained.read(Path(path), "riae")
        return found.fill(cls(found.section("riae", RiaeConfig), found.facts["channels"]))

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [*self.encoder, *self.encoder_latent, *self.decoder_latent, *self.decoder]

    def grid_for(self, image: Size) -> Size:
        """Latent grid (h, w) of an image (H, W): one cell per ``config.downsample`` pixels, at least one."""
        height, width = (max(1, round(side / self.config.downsample)) for side in image)
        return height, width

    def tiles(
        self,
        queries: Size,
        keys: Size,
        grid: Size,
        part: Part = WHOLE,
        device: torch.device | None = None,
    ) -> Tiles | None:
        """Which of a grid of keys each query of another grid, or of a part of it, sees; none with ``cloud`` attention."""
        config = self.config
        return (
            Tiles.between(queries, keys, grid, config.tile, config.halo, part, device)
            if self.tiled
            else None
        )

    def encode_points(
        self,
        colours: Tensor,
        at: Tensor,
        size: Size,
        cells: Tensor,
        grid: Size,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Colours [B, N, C] at [B or 1, N, 4] of an image (H, W), seen from latent cells [1, M, 4] of a grid (h, w) →
        latents [B, M, L].

        With ``tiled`` attention, cells and points are whole grids, and ``tiles`` those of the cells.
        """
        return self._to_latents(
            self._query_pixels(colours, at, size, cells, grid, tiles), cells, grid
        )

    def _query_pixels(
        self,
        colours: Tensor,
        at: Tensor,
        size: Size,
        cells: Tensor,
        grid: Size,
        tiles: Tiles | None,
    ) -> Tensor:
        """What the cells [1, M, 4] see: [B, M, D]."""
        batch = colours.shape[0]
        pixels = self.pixel_in(
            torch.cat([colours, self._place(at, size, grid).expand(batch, -1, -1)], dim=-1)
        )
        if tiles is not None:
            cells = tiles.in_order(cells[0])
        x = self.cell_in(self._features(cells, grid)).expand(batch, -1, -1)
        cell_places, pixel_places = _in_cells(cells, grid), _in_cells(at, grid)
        for block in self.encoder:
            x = block(x, pixels, cell_places, pixel_places, tiles)
        return x if tiles is None else tiles.restored(x)

    def _to_latents(self, x: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """[B, M, D] at all cells [1, M, 4] → latents [B, M, L]."""
        x = self._through(self.encoder_latent, x, cells, grid)
        latents = self.to_latent(x).float()
        return torch.tanh(latents) if self.config.bounded else latents

    def spread_latents(self, latents: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Latents [B, M, L] at cells [1, M, 4] → the decoder's keys [B, M, D]; once per image, however many points."""
        place = self._features(cells, grid).expand(latents.shape[0], -1, -1)
        return self._through(
            self.decoder_latent, self.latent_in(torch.cat([latents, place], dim=-1)), cells, grid
        )

    def _through(self, blocks: nn.ModuleList, x: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """[B, M, D] at all cells [1, M, 4], through blocks of the latent grid."""
        tiled = len(blocks) and self.config.latent_attention == "tiled"
        tiles = self.tiles(grid, grid, grid, device=x.device) if tiled else None
        for block in blocks:
            x = block(x, _in_cells(cells, grid), tiles)
        return x

    def decode_points(
        self,
        keys: Tensor,
        cells: Tensor,
        at: Tensor,
        size: Size,
        grid: Size,
        tiles: Tiles | None = None,
    ) -> Tensor:
        """Keys [B, M, D] of spread_latents at cells [B or 1, M, 4], asked at points [B or 1, P, 4] of an image (H, W) →
        colours [B, P, C].

        With ``tiles``, points are in tile order, and keys and cells those of ``tiles.part``.
        """
        x = self.point_in(self._place(at, size, grid)).expand(keys.shape[0], -1, -1)
        cell_places, point_places = _in_cells(cells, grid), _in_cells(at, grid)
        for block in self.decoder:
            x = block(x, keys, point_places, cell_places, tiles)
        return self.to_colour(x).float()

    @torch.no_grad()
    def encode(self, image: Tensor, grid: Size | None = None) -> Tensor:
        """Image [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w] from all of its pixels, on any grid."""
        size: Size = (image.shape[2], image.shape[3])
        grid = grid or self.grid_for(size)
        cells = coords.grid_coordinates(grid, device=image.device).unsqueeze(0)
        at_once = max(1, (_TILES_CHUNK if self.tiled else _ENCODE_CHUNK) // (size[0] * size[1]))
        encode = self._encode_tiles if self.tiled else self._encode_whole
        latents = torch.cat([encode(part, cells, grid) for part in image.split(at_once)])
        return rearrange(latents, "b (h w) l -> b l h w", h=grid[0])

    def _encode_whole(self, image: Tensor, cells: Tensor, grid: Size) -> Tensor:
        size: Size = (image.shape[2], image.shape[3])
        at = coords.grid_coordinates(size, grid, image.device).unsqueeze(0)
        return self.encode_points(rearrange(image, "b c h w -> b (h w) c"), at, size, cells, grid)

    def _encode_tiles(self, image: Tensor, cells: Tensor, grid: Size) -> Tensor:
        """Some tiles at a time, but for the blocks of the latent grid."""
        size: Size = (image.shape[2], image.shape[3])
        seen = image.new_empty(len(image), *grid, self.config.width)
        most = max(1, _TILES_CHUNK * grid[0] * grid[1] // image[:, 0].numel())
        for rows, columns in rectangles(grid, grid, self.config.tile, most):
            tiles = self.tiles(grid, size, grid, (rows, columns), image.device)
            assert tiles is not None
            y, x = tiles.part
            at = coords.grid_coordinates(size, grid, image.device, tiles.part).unsqueeze(0)
            some = coords.grid_coordinates(
                grid, device=image.device, part=(rows, columns)
            ).unsqueeze(0)
            found = self._query_pixels(
                rearrange(image[:, :, y, x], "b c h w -> b (h w) c"), at, size, some, grid, tiles
            )
            seen[:, rows, columns] = rearrange(
                found, "b (h w) d -> b h w d", h=rows.stop - rows.start
            )
        return self._to_latents(rearrange(seen, "b h w d -> b (h w) d"), cells, grid)

    def points_per_pixel(self, grid: Size, size: Size) -> Size:
        """How many points, down and across, a pixel of an image (H, W) is the mean of: as many as it takes for none to stand
        for more of the picture than the largest pixels of the training did.

        Half a latent cell is allowed for, since a grid says no better how large the images were.
        """
        smallest = self.config.decode_scales[0] if self.config.decode_scales else 1.0
        down, across = (
            max(1, math.ceil((smallest * cells - 0.5) * self.config.downsample / side))
            for cells, side in zip(grid, size, strict=True)
        )
        return down, across

    @torch.no_grad()
    def decode(self, latents: Tensor, size: Size, window: Window | None = None) -> Tensor:
        """Raw latents [B, L, h, w] → image [B, C, H, W] of any size, nominally in [−1, 1] (not clipped), or the pixels of it
        that lie in a window (y0, x0, y1, x1), [B, C, y1 − y0, x1 − x0]; InputError when that is not within the image.

        Pixels larger than any that were trained are means of several points (points_per_pixel)."""
        grid: Size = (latents.shape[2], latents.shape[3])
        part = coords.part_of(size, window)
        cells = coords.grid_coordinates(grid, device=latents.device).unsqueeze(0)
        points = math.prod(side.stop - side.start for side in part) * math.prod(
            self.points_per_pixel(grid, size)
        )
        at_once = max(1, _TILES_CHUNK // points) if self.tiled else len(latents)
        parts = []
        for some in latents.split(at_once):
            keys = self.spread_latents(rearrange(some, "b l h w -> b (h w) l"), cells, grid)
            parts.append(self._render(keys, cells, grid, size, part))
        return torch.cat(parts)

    def _render(self, keys: Tensor, cells: Tensor, grid: Size, size: Size, part: Part) -> Tensor:
        """Pixels of a part of an image; where they are means of points, of some rows at a time."""
        draw = self._decode_tiles if self.tiled else self._decode_chunks
        down, across = points = self.points_per_pixel(grid, size)
        if points == (1, 1):
            return draw(keys, cells, grid, size, part)
        rows, columns = part
        wide = slice(columns.start * across, columns.stop * across)
        band = max(1, _BAND // (len(keys) * down * (wide.stop - wide.start)))
        return torch.cat(
            [
                F.avg_pool2d(
                    draw(
                        keys,
                        cells,
                        grid,
                        (size[0] * down, size[1] * across),
                        (slice(y * down, min(y + band, rows.stop) * down), wide),
                    ),
                    points,
                )
                for y in range(rows.start, rows.stop, band)
            ],
            dim=2,
        )

    def _decode_chunks(
        self, keys: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        at = coords.grid_coordinates(size, grid, keys.device, part).unsqueeze(0)
        colours = torch.cat(
            [
                self.decode_points(keys, cells, some, size, grid)
                for some in at.split(max(1, _DECODE_CHUNK // len(keys)), dim=1)
            ],
            dim=1,
        )
        return rearrange(colours, "b (h w) c -> b c h w", h=part[0].stop - part[0].start)

    def _decode_tiles(
        self, keys: Tensor, cells: Tensor, grid: Size, size: Size, part: Part
    ) -> Tensor:
        image = keys.new_empty(
            len(keys),
            self.channels,
            *(side.stop - side.start for side in part),
            dtype=torch.float32,
        )
        grid_keys, grid_cells = (
            rearrange(x, "b (h w) d -> b h w d", h=grid[0]) for x in (keys, cells)
        )
        for rows, columns in rectangles(
            size, grid, self.config.tile, max(1, _TILES_CHUNK // len(keys)), part
        ):
            tiles = self.tiles(size, grid, grid, (rows, columns), keys.device)
            assert tiles is not None
            near, near_cells = (
                x[:, tiles.part[0], tiles.part[1]].flatten(1, 2) for x in (grid_keys, grid_cells)
            )
            at = tiles.in_order(coords.grid_coordinates(size, grid, keys.device, (rows, columns)))
            colours = tiles.restored(self.decode_points(near, near_cells, at, size, grid, tiles))
            image[
                :,
                :,
                rows.start - part[0].start : rows.stop - part[0].start,
                columns.start - part[1].start : columns.stop - part[1].start,
            ] = rearrange(colours, "b (h w) c -> b c h w", h=rows.stop - rows.start)
        return image

    def _features(self, at: Tensor, grid: Size) -> Tensor:
        """Of the places of cells."""
        if self.tiled:
            return coords.cell_features(at, grid, self.config.cell_fourier)
        return coords.fourier_features(at, self.config.fourier)

    def _place(self, at: Tensor, size: Size, grid: Size) -> Tensor:
        """Features of the places of an image's pixels, where in their cell they lie among them, and of their size."""
        features = [self._features(at, grid)]
        if not self.tiled:
            features.append(coords.cell_phase(at, grid))
        if self.config.condition_on_pixel_size:
            pixel = torch.tensor(
                [grid[1] / size[1], grid[0] / size[0]], dtype=torch.float32, device=at.device
            )
            features.append(pixel.expand(*at.shape[:-1], -1))
        return torch.cat(features, dim=-1)


def _in_cells(at: Tensor, grid: Size) -> Tensor:
    """Absolute coordinates in units of latent cells, from the image's centre: [..., 4] → [..., 2]."""
    return at[..., :2] * torch.tensor([grid[1], grid[0]], dtype=torch.float32, device=at.device)
