"""How an RIAE is trained: what is of its loss and not of the model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r2id.config.section import Fraction, Scales, Section

PixelLoss = Literal["l1", "mse", "charbonnier"]
"""Errors of colours, each a line of PIXEL_LOSSES in r2id.training.losses.pixel.

l1: the absolute error. mse: the squared error. charbonnier: √(e² + 10⁻⁶), smooth at 0.
"""


class LossConfig(Section):
    pixel: PixelLoss = "mse"
    """Error of colours that is minimised."""
    texture: float = Field(default=0.0, ge=0)
    """Weight of a second term: the same error of the differences between each point and one a pixel
    away, in a direction drawn anew, which is the derivative of the image function. Doubles what the
    decoder costs."""
    encode_cloud: Fraction = 1 / 16
    """Share of an image's pixels that the encoder sees in a training step: one random cloud for all
    cells. With ``tiled`` attention it sees them all."""
    encode_scales: Scales | None = None
    """Smallest and largest factor between an image's height, and likewise its width, and those at
    which the encoder sees it, drawn anew each step; none is 1."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise added to the latents, so that near latents decode
    alike."""
    decode_cloud: Fraction = 1.0
    """Share of the latents that the decoder sees in a training step: one random cloud for all
    points. With ``tiled`` attention a tile sees all that are near."""
    decode_pixels: int = Field(default=256, ge=1)
    """Random output pixels that a training step decodes of each image: its cost does not depend on
    the image's size. With ``tiled`` attention they come as whole tiles, at least one."""
    jitter: float = Field(default=1.0, ge=0)
    """Strength of the coordinate jitter; 1 is a Gaussian of half a pixel, as published."""
