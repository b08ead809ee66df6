"""Settings of the models: what a checkpoint's weights belong to."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from r2id.config.section import IntPair, Section, Size, as_tuple


def lattice_grid(size: Size, cell: int) -> Size:
    """Return the latent grid (h, w) of an image (H, W): as many cells as it touches."""
    return math.ceil(size[0] / cell), math.ceil(size[1] / cell)


class RiaeConfig(Section):
    """Architecture of RIAE."""

    kind: Literal["lattice", "attention"] = "lattice"
    """How pictures become latents and back. lattice: by the colours at fixed points of each latent
    cell, with a linear map and a network on the latent grid. attention: latent cells query pixels,
    and pixels query latents, by cross-attention; the first published design."""
    latent_channels: int = Field(default=16, ge=1)
    """Channels of the latents."""
    downsample: float = Field(default=4.0, ge=1)
    """Side of one latent cell in pixels. ``lattice``: a whole number, and an H×W image has as many
    cells as it touches, H/downsample and W/downsample rounded up. ``attention``: rounded to the
    nearest, at least one each way."""
    width: int = Field(default=192, ge=8)
    """Width of the latent side; 256 of ``attention`` by default."""
    encoder_blocks: int = Field(default=2, ge=0)
    """Blocks of the encoder: on the latent grid (``lattice``), or in which the latents query the
    image's pixels (``attention``)."""
    decoder_blocks: int = Field(default=3, ge=0)
    """Blocks of the decoder: on the latent grid (``lattice``), or in which output pixels query the
    latents (``attention``)."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    """Size of the feed-forward layers: their hidden width relative to the width of their block, as
    in a network of two layers with as many weights."""
    linear: bool = True
    """Code and decode by a linear map of the colours at the points of cells too, which the network
    corrects. ``attention`` does so only when this is set, with points in each cell as many as
    pixels."""
    lapped: bool = True
    """Mix the colours of points across the borders of cells before coding, and unmix them after
    decoding, so that neighbouring cells join without a line (``lattice``)."""
    features: int = Field(default=16, ge=0)
    """Features of each point, from which a network draws what lies between points; 0: nothing but
    bicubic interpolation does (``lattice``)."""
    pixel_width: int = Field(default=256, ge=8)
    """Width of the pixel side: the keys of the encoder and the queries of the decoder
    (``attention``, as are the settings below)."""
    heads: int = Field(default=8, ge=1)
    """Attention heads of the latent side; those of the pixel side have the same width each."""
    fourier: IntPair = (-3, 7)
    """First and last power p of the Fourier features sin, cos(π·2^p·coordinate)."""
    gaussian_window: bool = True
    """Let each head learn how far it looks, in latent cells: a Gaussian window on top of its
    attention."""

    @property
    def cell(self) -> int:
        """Points per side of a cell's lattice."""
        return round(self.downsample)

    @property
    def pixel_heads(self) -> int:
        """Heads of the pixel side, as wide as those of the latent side."""
        return max(1, self.heads * self.pixel_width // self.width)

    def grid_for(self, image: Size) -> Size:
        """Return the latent grid (h, w) of an image (H, W) at its own size."""
        if self.kind == "lattice":
            return lattice_grid(image, self.cell)
        height, width = (max(1, round(side / self.downsample)) for side in image)
        return height, width

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_attention(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("kind") == "attention":
            return {**_BY_ATTENTION, **values}
        return values

    @model_validator(mode="after")
    def _of_its_kind(self) -> RiaeConfig:
        foreign = _ATTENTION if self.kind == "lattice" else _LATTICE
        for name in foreign:
            value, default = getattr(self, name), type(self).model_fields[name].default
            if self.kind == "attention":
                default = _BY_ATTENTION.get(name, default)
            if value != default:
                other = "attention" if self.kind == "lattice" else "lattice"
                raise ValueError(
                    f"{name} = {value!r}: is a setting of kind '{other}', and kind is "
                    f"'{self.kind}'; leave it out, or set riae.kind = '{other}'"
                )
        if self.kind == "lattice" and self.downsample != int(self.downsample):
            raise ValueError(
                f"downsample = {self.downsample}: must be a whole number of pixels for kind "
                "'lattice'"
            )
        if self.kind == "attention" and not (self.encoder_blocks and self.decoder_blocks):
            raise ValueError("encoder_blocks and decoder_blocks: at least 1 for kind 'attention'")
        if self.kind == "attention":
            least = WINDOW_DIMS + 1 if self.gaussian_window else 1
            _check_heads("width", self.width, self.heads, least)
            _check_heads("pixel_width", self.pixel_width, self.pixel_heads, least)
        return self


WINDOW_DIMS = 6
"""Dimensions of a head that hold a Gaussian window: 2 for u_q·u_k, 2 for |u_k|² and 2 for |u_q|²,
each square in two parts (see r2id.models.attention)."""


def _check_heads(name: str, width: int, heads: int, least: int = 1) -> None:
    """Raise ValueError unless a width divides into heads that are at least so wide."""
    if width % heads or width // heads < least:
        wide = f", each at least {least} wide" if least > 1 else ""
        raise ValueError(f"{name} = {width}: must be a multiple of its {heads} heads{wide}")


_BY_ATTENTION = {"linear": False, "lapped": False, "width": 256}
"""Defaults of kind 'attention' that are others than those of the fields."""
_LATTICE = ("lapped", "features")
_ATTENTION = ("pixel_width", "heads", "fourier", "gaussian_window")
"""Settings of one kind alone."""


AttentionKind = Literal["full", "cloud", "axial", "linear", "tiled"]
"""How tokens of R2ID attend to each other, each a line of ATTENTION_KINDS in r2id.models.mixing.

full: to all tokens. cloud: within random groups in training, else to all. axial: along rows in half
of the heads, along columns in the others. linear: to all, by a kernel instead of softmax. tiled:
within tiles of the grid and a halo.
"""


class LevelConfig(Section):
    """A level of R2ID: a grid with twice the cells a side of the next one, and local attention."""

    width: int = Field(ge=8)
    """Width of its tokens: a multiple of the width of a head, which all levels share."""
    blocks: int = Field(default=2, ge=1)
    """Blocks before its tokens are merged to the next grid, and as many after they are split."""


class R2idConfig(Section):
    """Architecture of R2ID."""

    width: int = Field(default=256, ge=8)
    """Width of the tokens."""
    heads: int = Field(default=8, ge=1)
    """Attention heads of each block."""
    encoder_blocks: int = Field(default=8, ge=0)
    """Self-attention blocks, run once per step whatever the number of conditions."""
    decoder_blocks: int = Field(default=8, ge=1)
    """Blocks of self-attention and cross-attention to the condition, run once per condition."""
    attention: Annotated[
        tuple[AttentionKind, ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("full",)
    """Kind of self-attention of the blocks, encoder blocks first; several kinds take turns."""
    cloud_tokens: int = Field(default=256, ge=1)
    """Approximate number of tokens in a random group of 'cloud'."""
    tile: int = Field(default=8, ge=1)
    """Side of the tiles of 'tiled' and of ``levels``, in tokens."""
    halo: int = Field(default=4, ge=0)
    """How far around its tile a token of 'tiled' and of ``levels`` sees, in tokens."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    """Size of the feed-forward layers: their hidden width relative to ``width``, as in a network of
    two layers with as many weights."""
    condition: Literal["class", "attributes", "embedding", "none"] = "class"
    """What samples are conditioned on: the class, the attributes of the dataset (CelebA has 40),
    the embedding of a text that came with the image, or nothing."""
    condition_tokens: int = Field(default=2, ge=1)
    """Number of tokens made of a condition; the embedding of a text of T tokens makes T."""
    conditioning: Literal["context", "cross"] = "context"
    """How decoder blocks are told the condition. context: its tokens stand among those of the grid,
    and their mean is added to the time that modulates the blocks (Li & He 2025). cross: every block
    attends to them by cross-attention, as published first; the default with kinds of ``attention``
    other than full, which 'context' does not go with."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the values that each branch of a block drops in training."""
    fourier: IntPair = (-3, 7)
    """First and last power p of the coordinates' Fourier features sin, cos(π·2^p·coordinate)."""
    time_fourier: IntPair = (-3, 6)
    """First and last power p of the Fourier features of ᾱ, the share of signal in the variance."""
    jitter: float = Field(default=0.5, ge=0)
    """Strength of the random displacement of tokens in training; 1 is a standard deviation of half
    a latent cell, as published, which is too much for a small grid."""
    levels: Annotated[tuple[LevelConfig, ...], BeforeValidator(as_tuple)] = ()
    """Levels around the blocks, finest first, for large grids and pixels (HDiT, Crowson et al.
    2024). Encoder and decoder blocks then run on a grid with half the cells a side for each level.
    The levels' own blocks attend within tiles of ``tile`` and ``halo``, without dropout."""

    @model_validator(mode="before")
    @classmethod
    def _cross_with_other_attention(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("attention", ["full"]) not in (
            ["full"],
            ("full",),
        ):
            return {"conditioning": "cross", **values}
        return values

    @model_validator(mode="after")
    def _context_is_seen_by_all(self) -> R2idConfig:
        if self.conditioning == "context" and set(self.attention) != {"full"}:
            raise ValueError(
                f"conditioning = 'context': goes with attention = 'full' alone, not "
                f"{list(self.attention)}; must be 'cross'"
            )
        return self

    @model_validator(mode="after")
    def _levels_have_whole_heads(self) -> R2idConfig:
        _check_heads("width", self.width, self.heads)
        head = self.width // self.heads
        for number, level in enumerate(self.levels):
            if level.width % head:
                raise ValueError(
                    f"levels.{number}.width = {level.width}: must be a multiple of {head}, the "
                    f"width of a head (width {self.width} / heads {self.heads})"
                )
        return self
