"""What the models are."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from r2id.config.section import IntPair, Scales, Section, as_tuple


class RiaeConfig(Section):
    kind: Literal["attention"] = "attention"
    """Of encoder and decoder, by their registries in r2id.models."""
    latent_channels: int = Field(default=64, ge=1)
    downsample: float = Field(default=4.0, ge=1)
    """Side of one latent cell in pixels: an H×W image has round(H/downsample) × round(W/downsample)
    latents, at least one."""
    width: int = Field(default=256, ge=8)
    """Width of the latent side."""
    pixel_width: int = Field(default=256, ge=8)
    """Width of the pixel side: the keys of the encoder and the queries of the decoder."""
    heads: int = Field(default=8, ge=1)
    encoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which the latents query the image's pixels."""
    decoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which output pixels query the latents."""
    latent_blocks: int = Field(default=0, ge=0)
    """Self-attention blocks on the latent grid, at the end of the encoder and again at the start of
    the decoder."""
    latent_attention: Literal["global", "tiled"] = "global"
    """In those blocks, where ``attention`` is tiled: between all latents, which takes most of the
    time of an image of more than some thousand latents, or between those of a tile and its halo."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    fourier: IntPair = (-3, 7)
    """First and last power p of the Fourier features sin, cos(π·2^p·coordinate), for ``cloud``
    attention."""
    attention: Literal["cloud", "tiled"] = "cloud"
    """Between latents and pixels. cloud is dense: all of them, and in training random clouds of
    them. tiled: those of a square tile of latent cells see what lies within the tile and a halo,
    whatever the sizes, so that time and memory grow linearly with the pixels; places are then given
    in cells, the same in an image of any size."""
    tile: int = Field(default=4, ge=1)
    """Side of a tile in latent cells, for ``tiled`` attention."""
    halo: float = Field(default=2.0, ge=0)
    """How far around its tile a query sees, in latent cells, for ``tiled`` attention."""
    cell_fourier: IntPair = (-3, 2)
    """First and last power p of the features sin, cos(π·2^p·place in cells), for ``tiled``
    attention."""
    gaussian_window: bool = True
    """Each head learns how far it looks, in latent cells: a Gaussian window on top of the learned
    attention."""
    bounded: bool = False
    """Latents through tanh, so that they lie in (−1, 1)."""
    decode_scales: Scales | None = None
    """Smallest and largest factor between an image's height, and likewise its width, and the size
    at which the decoder renders it: training draws from them anew each step; none is 1. They are
    the model's because what is rendered at a smaller size is averaged, with no loss at hand."""
    condition_on_pixel_size: bool = False
    """Tell encoder and decoder how large pixels are, in latent cells, beside where they are: a
    pixel is then what an area looks like from afar, not the colour of a point (cell decoding of
    LIIF, Chen et al. 2021). For training at scales."""


AttentionKind = Literal["full", "cloud", "axial", "linear", "tiled"]
"""How tokens of R2ID attend to each other, each a line of ATTENTION_KINDS in r2id.models.mixing.

full: to all tokens. cloud: within random groups in training, else to all. axial: along rows in half
of the heads, along columns in the others. linear: to all, by a kernel instead of softmax. tiled:
within tiles of the grid and a halo.
"""


class R2idConfig(Section):
    width: int = Field(default=256, ge=8)
    heads: int = Field(default=8, ge=1)
    encoder_blocks: int = Field(default=8, ge=0)
    """Self-attention blocks, run once per step whatever the number of conditions."""
    decoder_blocks: int = Field(default=8, ge=1)
    """Self-attention and cross-attention blocks, run once per condition."""
    attention: Annotated[
        tuple[AttentionKind, ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("full",)
    """Kind of self-attention of the blocks in turn, encoder first, and over again."""
    cloud_tokens: int = Field(default=256, ge=1)
    """Tokens of a random group of 'cloud', about."""
    tile: int = Field(default=8, ge=1)
    """Side of the tiles of 'tiled', in tokens."""
    halo: int = Field(default=4, ge=0)
    """What tokens of 'tiled' see around their tile, in tokens."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    condition: Literal["class", "attributes", "embedding", "none"] = "class"
    """What samples are drawn under: their class, the attributes of the set (CelebA's 40), the
    embedding of a text that came with the image, or nothing."""
    condition_tokens: int = Field(default=2, ge=1)
    """Tokens made of the condition, attended to by every decoder block; embeddings of T tokens make
    T."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    fourier: IntPair = (-3, 7)
    """First and last power p of the coordinates' Fourier features."""
    time_fourier: IntPair = (-3, 6)
    """First and last power p of the Fourier features of ᾱ."""
    jitter: float = Field(default=0.5, ge=0)
    """Strength of the coordinate jitter in training; 1 is a Gaussian of half a latent cell, as
    published, which is too much for a small grid."""
