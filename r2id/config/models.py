"""Settings of the models: what a checkpoint's weights belong to."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from r2id.config.section import IntPair, Scales, Section, as_tuple


class RiaeConfig(Section):
    """Architecture of RIAE."""

    kind: Literal["attention"] = "attention"
    """Kind of encoder and decoder, a name in ENCODERS and DECODERS of r2id.models."""
    latent_channels: int = Field(default=64, ge=1)
    """Channels of the latents."""
    downsample: float = Field(default=4.0, ge=1)
    """Side of one latent cell in pixels: an H×W image has round(H/downsample) × round(W/downsample)
    latents, at least one each way."""
    width: int = Field(default=256, ge=8)
    """Width of the latent side."""
    pixel_width: int = Field(default=256, ge=8)
    """Width of the pixel side: the keys of the encoder and the queries of the decoder."""
    heads: int = Field(default=8, ge=1)
    """Attention heads of the latent side; those of the pixel side have the same width each."""
    encoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which the latents query the image's pixels."""
    decoder_blocks: int = Field(default=1, ge=1)
    """Blocks in which output pixels query the latents."""
    latent_blocks: int = Field(default=0, ge=0)
    """Self-attention blocks on the latent grid, at the end of the encoder and again at the start of
    the decoder."""
    latent_attention: Literal["global", "tiled"] = "global"
    """Which latents attend to each other in those blocks if ``attention`` is tiled: all, which
    takes most of the time with more than a few thousand latents, or those of a tile and its
    halo."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    """Size of the feed-forward layers: their hidden width relative to the width of their block, as
    in a network of two layers with as many weights."""
    fourier: IntPair = (-3, 7)
    """First and last power p of the Fourier features sin, cos(π·2^p·coordinate), for ``cloud``
    attention."""
    attention: Literal["cloud", "tiled"] = "cloud"
    """Which latents and pixels attend to each other. cloud: all of them, in training random clouds
    of them. tiled: a square tile of latent cells sees what lies in the tile and in a halo around
    it, so that time and memory grow linearly with the pixels; positions are then given in cells,
    which are the same in an image of any size."""
    tile: int = Field(default=4, ge=1)
    """Side of a tile in latent cells, for ``tiled`` attention."""
    halo: float = Field(default=2.0, ge=0)
    """How far around its tile a query sees, in latent cells, for ``tiled`` attention."""
    cell_fourier: IntPair = (-3, 2)
    """First and last power p of the features sin, cos(π·2^p·position in cells), for ``tiled``
    attention."""
    gaussian_window: bool = True
    """Let each head learn how far it looks, in latent cells: a Gaussian window on top of its
    attention."""
    bounded: bool = False
    """Pass latents through tanh, so that they lie in (−1, 1)."""
    decode_scales: Scales | None = None
    """Smallest and largest factor between the size of an image and that at which the decoder
    renders it in training, drawn anew each step for the height and the width; none is 1. It belongs
    to the model, because pictures that are rendered smaller than the smallest are averaged."""
    condition_on_pixel_size: bool = False
    """Tell encoder and decoder how large pixels are, in latent cells. A pixel then stands for an
    area, not for a point (cell decoding of LIIF, Chen et al. 2021). For training at several
    scales."""


AttentionKind = Literal["full", "cloud", "axial", "linear", "tiled"]
"""How tokens of R2ID attend to each other, each a line of ATTENTION_KINDS in r2id.models.mixing.

full: to all tokens. cloud: within random groups in training, else to all. axial: along rows in half
of the heads, along columns in the others. linear: to all, by a kernel instead of softmax. tiled:
within tiles of the grid and a halo.
"""


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
    """Side of the tiles of 'tiled', in tokens."""
    halo: int = Field(default=4, ge=0)
    """How far around its tile a token of 'tiled' sees, in tokens."""
    ffn_ratio: float = Field(default=4.0, gt=0)
    """Size of the feed-forward layers: their hidden width relative to ``width``, as in a network of
    two layers with as many weights."""
    condition: Literal["class", "attributes", "embedding", "none"] = "class"
    """What samples are conditioned on: the class, the attributes of the dataset (CelebA has 40),
    the embedding of a text that came with the image, or nothing."""
    condition_tokens: int = Field(default=2, ge=1)
    """Number of tokens made of a condition, which every decoder block attends to; the embedding of
    a text of T tokens makes T."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the values that each branch of a block drops in training."""
    fourier: IntPair = (-3, 7)
    """First and last power p of the coordinates' Fourier features sin, cos(π·2^p·coordinate)."""
    time_fourier: IntPair = (-3, 6)
    """First and last power p of the Fourier features of ᾱ, the share of signal in the variance."""
    jitter: float = Field(default=0.5, ge=0)
    """Strength of the random displacement of tokens in training; 1 is a standard deviation of half
    a latent cell, as published, which is too much for a small grid."""
