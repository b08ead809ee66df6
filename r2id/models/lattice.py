"""RIAE on a lattice: pictures of any size, by the colours at fixed points of each latent cell.

Every latent cell has a lattice of s×s points. To encode, the picture is read at the points, and
each cell's C·s² values become its L latents: by a linear map, which begins as a principal component
analysis (PCA) of the training images, and by a network that corrects it, which sees the cells
around too. To decode, the latents become the colours at the points in the same two ways. Before
coding, colours are mixed across the borders of cells, and after decoding unmixed, so that cells
join (r2id.models.lapped). Any other place is then read by bicubic interpolation, which a second
network corrects for pixels that are smaller than the distance of points.

A picture has a *native size* on its latent grid: the number of lattice points that it covers. Where
its own size is the native one, points and pixels coincide and nothing is resampled. The picture
begins at the lattice's top left corner and may end within the last cells; the points beyond mirror
it and are never decoded. So no size is cropped, and none is resampled to fit the cells.

All layers look a fixed number of cells far. So a part of a picture, computed from the part and its
surroundings, equals the same part of the whole, and large pictures are computed piece by piece.

Shape letters: B batch · C colours · H, W picture · s points per side of a cell · h, w latent grid
· L latent channels · D width · F features of a lattice point.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from r2id.config import RiaeConfig
from r2id.config.models import lattice_grid
from r2id.errors import InputError
from r2id.models.attention import RMSNorm
from r2id.models.back_projection import back_project, find_residuals, sampled_size, surroundings
from r2id.models.cells import native_size, on_lattice, pieces, to_cells, to_points
from r2id.models.coords import WHOLE, OnProgress, Part, Size, Window, part_of
from r2id.models.lapped import lap, unlap
from r2id.models.layers import ExactLinear, zero_linear
from r2id.models.resampling import resample_seen, taps

_KERNEL = 5
"""Cells that a block's depthwise convolution sees along each axis."""


class Block(nn.Module):
    """A depthwise convolution over cells and a feed-forward layer, residual (ConvNeXt's block).

    Liu et al. 2022, arXiv:2201.03545. Its output starts as zero, so that an untrained block
    changes nothing.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.around = nn.Conv2d(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm = RMSNorm(width)
        self.widen = nn.Linear(width, round(width * ratio))
        self.narrow = zero_linear(round(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, h, w, D] → [B, h, w, D]."""
        seen = _convolve(self.around, x)
        return x + self.narrow(F.gelu(self.widen(self.norm(seen))))


class LatticeEncoder(nn.Module):
    """Cells' points → latents: a linear map, and a network on the latent grid that corrects it."""

    stored_as: ClassVar[dict[str, str]] = {"cell_blocks": "encoder_blocks"}

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.cell = config, config.cell
        values = channels * self.cell**2
        self.to_code = ExactLinear(values, config.latent_channels) if config.linear else None
        self.see = nn.Conv2d(values, config.width, 3, padding=1)
        self.cell_blocks = nn.ModuleList(
            Block(config.width, config.ffn_ratio) for _ in range(config.encoder_blocks)
        )
        last = zero_linear if config.linear else nn.Linear
        self.correct_code = nn.Sequential(
            RMSNorm(config.width), last(config.width, config.latent_channels)
        )
        self.reach = 1 + len(self.cell_blocks) * (_KERNEL // 2) + config.lapped

    def blocks(self) -> list[nn.Module]:
        return list(self.cell_blocks)

    def forward(self, lattice: Tensor) -> Tensor:
        """Colours at all points [B, C, h·s, w·s] → latents [B, L, h, w]."""
        if self.config.lapped:
            lattice = lap(lattice, self.cell)
        x = to_cells(lattice, self.cell).contiguous()
        hidden = _convolve(self.see, x)
        for block in self.cell_blocks:
            hidden = block(hidden)
        # Float32 under autocast too: latents are stored, and diffusion normalises them.
        latents = self.correct_code(hidden).float()
        if self.to_code is not None:
            latents = latents + self.to_code(x)
        return rearrange(latents, "b h w l -> b l h w")

    def encode(self, images: Tensor, native: Size, advance: OnProgress | None = None) -> Tensor:
        """Encode images [B, C, H, W], piece by piece, as pictures of a native size.

        Returns latents [B, L, h, w].
        """
        grid = self.config.grid_for(native)
        latents = images.new_empty(
            len(images), self.config.latent_channels, *grid, dtype=torch.float32
        )
        for some, rows, columns in pieces(grid, WHOLE, (self.cell, self.cell), len(images)):
            near = _grown(rows, self.reach, grid[0]), _grown(columns, self.reach, grid[1])
            encoded = self(on_lattice(images[some], native, self.cell, near))
            latents[some, :, rows, columns] = encoded[
                :, :, _within(rows, near[0]), _within(columns, near[1])
            ]
            if advance:
                sides = zip(native, (rows, columns), strict=True)
                advance(
                    math.prod(
                        min(own, side.stop * self.cell) - side.start * self.cell
                        for own, side in sides
                    )
                )
        return latents


class LatticeDecoder(nn.Module):
    """Latents → colours at the cells' points, and from these the colours of pixels of any size."""

    stored_as: ClassVar[dict[str, str]] = {"cell_blocks": "decoder_blocks"}

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.cell, self.channels = config, config.cell, channels
        values, width, features = channels * self.cell**2, config.width, config.features
        self.from_code = ExactLinear(config.latent_channels, values) if config.linear else None
        self.spread = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.cell_blocks = nn.ModuleList(
            Block(width, config.ffn_ratio) for _ in range(config.decoder_blocks)
        )
        self.decoded = RMSNorm(width)
        self.correct_colours = zero_linear(width, values)
        self.fine = Points(features, channels, width, self.cell) if features else None
        self.reach = 1 + len(self.cell_blocks) * (_KERNEL // 2) + config.lapped

    def blocks(self) -> list[nn.Module]:
        return list(self.cell_blocks)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """Decode latents [B, L, h, w] at all points.

        Returns colours [B, C, h·s, w·s] and features [B, F, h·s, w·s].
        """
        code = rearrange(latents, "b l h w -> b h w l").contiguous()
        hidden = _convolve(self.spread, code)
        for block in self.cell_blocks:
            hidden = block(hidden)
        hidden = self.decoded(hidden)
        colours = self.correct_colours(hidden).float()
        if self.from_code is not None:
            colours = colours + self.from_code(code)
        colours = to_points(colours, self.cell)
        if self.config.lapped:
            colours = unlap(colours, self.cell)
        return (colours, None) if self.fine is None else self.fine(hidden, colours)

    def render(
        self, latents: Tensor, size: Size, native: Size | None = None, part: Part = WHOLE
    ) -> Tensor:
        """Decode a part of pictures of any size → [B, C, rows, columns].

        Latents [B, L, h, w] of pictures of a native size; see RIAE.decode. Means of
        smaller pixels are not corrected, as training has it.
        """
        grid: Size = (latents.shape[2], latents.shape[3])
        return self._drawn(latents, size, native or native_size(grid, size, self.cell), part)[0]

    def _drawn(
        self, latents: Tensor, size: Size, native: Size, part: Part
    ) -> tuple[Tensor, Tensor, Size]:
        """Render a part. Returns also the colours of points around it and the first one's place."""
        grid: Size = (latents.shape[2], latents.shape[3])
        near, points = self._needed(grid, size, native, part)
        colours, features = self(latents[:, :, near[0], near[1]])
        colours = colours[:, :, points[0], points[1]]
        first = (
            near[0].start * self.cell + points[0].start,
            near[1].start * self.cell + points[1].start,
        )
        drawn = colours if native == size else resample_seen(colours, native, size, part, first)
        if self.fine is not None:
            assert features is not None
            if _finer(size, native):
                features = self.fine.look(features)[:, :, points[0], points[1]]
                drawn = drawn + self.fine.between(features, native, size, part, first)
            elif torch.is_grad_enabled():
                drawn = drawn + self.fine.nothing(features)
        return drawn, colours, first

    def decode(
        self,
        latents: Tensor,
        size: Size,
        window: Window | None = None,
        native: Size | None = None,
        advance: OnProgress | None = None,
    ) -> Tensor:
        """Decode pictures of any size, or a window of them, piece by piece; see RIAE.decode."""
        grid: Size = (latents.shape[2], latents.shape[3])
        native = native or native_size(grid, size, self.cell)
        if lattice_grid(native, self.cell) != grid:
            cells = lattice_grid(native, self.cell)
            raise InputError(
                f"native size {native[0]}x{native[1]}: has {cells[0]}x{cells[1]} cells, and the "
                f"latents have {grid[0]}x{grid[1]}"
            )
        part = part_of(size, window)
        sides = [side.stop - side.start for side in part]
        images = latents.new_empty(len(latents), self.channels, *sides, dtype=torch.float32)
        # Where pixels are larger than points, points are what is counted.
        scales = max(1.0, native[0] / size[0]), max(1.0, native[1] / size[1])
        for some, rows, columns in pieces(size, part, scales, len(latents)):
            images[some, :, _within(rows, part[0]), _within(columns, part[1])] = (
                self._keeping_means(latents[some], size, native, (rows, columns))
            )
            if advance:
                advance((rows.stop - rows.start) * (columns.stop - columns.start))
        return images

    def _keeping_means(self, latents: Tensor, size: Size, native: Size, part: Part) -> Tensor:
        """Render a part whose smaller pixels have the colours of points as their means."""
        if not _finer(size, native):
            return self.render(latents, size, native, part)
        # Means are taken in the picture's own pixels, unless these are very small.
        sampled, near = sampled_size(native, size), surroundings(native, size, part)
        drawn, seen, first = self._drawn(latents, sampled, native, near)
        residuals = find_residuals(drawn, seen, native, sampled, near, first)
        if sampled == size:
            drawn = drawn[:, :, _within(part[0], near[0]), _within(part[1], near[1])]
        else:
            drawn = self.render(latents, size, native, part)
        return back_project(drawn, residuals, native, size, part)

    def _needed(self, grid: Size, size: Size, native: Size, part: Part) -> tuple[Part, Part]:
        """Which cells a part needs, and which of the points of these it reads."""
        near, points = [], []
        for cells, out, own, side in zip(grid, size, native, part, strict=True):
            start, stop, _ = side.indices(out)
            read = slice(start, stop)
            if own != out:
                read = taps(own, out, slice(start, stop))[0]
                read = slice(max(0, read.start - 1), min(own, read.stop + 1))
            # Two points further for the two convolutions over points.
            first = max(0, (read.start - 2) // self.cell - self.reach)
            last = min(cells, -(-(read.stop + 2) // self.cell) + self.reach)
            near.append(slice(first, last))
            points.append(slice(read.start - first * self.cell, read.stop - first * self.cell))
        return (near[0], near[1]), (points[0], points[1])


class Points(nn.Module):
    """Layers on the lattice's points, each of which sees the eight around it."""

    def __init__(self, features: int, channels: int, width: int, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.to_features = nn.Linear(width, features * cell**2)
        self.mix = nn.Conv2d(features + channels, features, 3, padding=1)
        self.sharpen = nn.Conv2d(features, channels, 3, padding=1)
        nn.init.zeros_(self.sharpen.weight)
        assert self.sharpen.bias is not None
        nn.init.zeros_(self.sharpen.bias)
        self.look = nn.Conv2d(features, 2 * features, 3, padding=1)
        self.between = BetweenPoints(2 * features, channels)

    def forward(self, hidden: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
        """Correct the colours [B, C, h·s, w·s] of points, given what cells hold, [B, h, w, D].

        Returns them and features [B, F, h·s, w·s].
        """
        features = torch.cat([to_points(self.to_features(hidden), self.cell), colours], dim=1)
        features = F.gelu(self.mix(features.contiguous(memory_format=torch.channels_last)))
        return colours + self.sharpen(features).float(), features

    def nothing(self, features: Tensor) -> Tensor:
        """Return 0, as a function of the weights for smaller pixels, where none are drawn.

        So they have a gradient in every step. Without one, plain AdamW leaves a weight alone and
        ZeRO moves it on by its momentum, or by the gradient of the last step that had one.
        """
        corner = slice(0, 1), slice(0, 1)
        seen = self.look(features[:, :, :1, :1])
        return 0 * self.between(seen, (1, 1), (1, 1), corner, (0, 0)).sum()


class BetweenPoints(nn.Module):
    """Colours of pixels smaller than the distance of points, as a correction of interpolated ones.

    A network of a pixel alone, told the features around it, where between the points it is and how
    large it is: the local implicit image function of Chen et al. 2021 (LIIF, arXiv:2012.09161).
    """

    def __init__(self, features: int, channels: int) -> None:
        super().__init__()
        self.place = nn.Linear(6, features)
        self.hidden = nn.Linear(features, features)
        self.to_colour = zero_linear(features, channels)

    def forward(
        self, features: Tensor, native: Size, size: Size, part: Part, first: Size
    ) -> Tensor:
        """Features [B, F, …] of points from number ``first`` on → [B, C, rows, columns]."""
        at = [
            (torch.arange(*side.indices(out), dtype=torch.float32, device=features.device) + 0.5)
            * (own / out)
            - 0.5
            for side, out, own in zip(part, size, native, strict=True)
        ]
        y, x = (places - start for places, start in zip(at, first, strict=True))
        seen = _between(features.float(), y, x)
        told = torch.cat(
            [
                _told(at[0], native[0] / size[0])[:, None].expand(-1, len(at[1]), -1),
                _told(at[1], native[1] / size[1])[None].expand(len(at[0]), -1, -1),
            ],
            dim=-1,
        )
        hidden = rearrange(seen, "b f h w -> b h w f") + self.place(told)
        hidden = F.gelu(self.hidden(F.gelu(hidden)))
        return rearrange(self.to_colour(hidden), "b h w c -> b c h w").float()


def _between(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Interpolate [B, F, H, W] bilinearly at these rows and columns, which may be fractions."""
    if torch.are_deterministic_algorithms_enabled():  # the backward of grid_sample is not, on CUDA
        for axis, places in ((2, rows), (3, columns)):
            last = x.shape[axis] - 1
            lower = places.floor().clamp(0, last)
            share = (places - lower).clamp(0, 1).float()
            lower = lower.long()
            low, high = (x.index_select(axis, it) for it in (lower, (lower + 1).clamp(max=last)))
            x = torch.lerp(low, high, share[:, None] if axis == 2 else share)
        return x
    # grid_sample counts from −1 to 1 between the edges of what is given.
    down, across = (
        (2 * places + 1) / count - 1
        for places, count in zip((rows, columns), x.shape[2:], strict=True)
    )
    where = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).float()
    return F.grid_sample(
        x,
        where.expand(len(x), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def _finer(size: Size, native: Size) -> bool:
    """Whether pixels are smaller than the distance of points, along an axis at least."""
    return size[0] > native[0] or size[1] > native[1]


def _told(places: Tensor, pixel: float) -> Tensor:
    """Describe pixels along one axis: [N] → phase between two points and pixel size, [N, 3]."""
    angle = 2 * math.pi * places
    smaller = torch.full_like(places, max(0.0, 1 - pixel))
    return torch.stack([angle.sin(), angle.cos(), smaller], dim=-1).float()


def _convolve(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """Apply a convolution to [B, h, w, D], whose memory is that of PyTorch's channels_last."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _grown(part: slice, by: int, count: int) -> slice:
    start, stop, _ = part.indices(count)
    return slice(max(0, start - by), min(count, stop + by))


def _within(part: slice, whole: slice) -> slice:
    return slice(part.start - whole.start, part.stop - whole.start)
