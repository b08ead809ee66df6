"""Settings of RIAE's loss: how it is trained, as opposed to what the model is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from r2id.config.section import Fraction, Scales, Section

PixelLoss = Literal["l1", "mse", "charbonnier"]
"""Losses of colours, each a line of PIXEL_LOSSES in r2id.training.losses.pixel.

l1: the absolute error. mse: the squared error. charbonnier: √(e² + 10⁻⁶), smooth at 0.
"""


class LossConfig(Section):
    """How RIAE's reconstruction error is measured, and on what."""

    pixel: PixelLoss = "mse"
    """Loss of colours that is minimised."""
    texture: float = Field(default=0.0, ge=0)
    """Weight of a second term: the same loss of the colour differences between each point and
    another one, one pixel away in a random direction. It compares derivatives of the images, and
    doubles the cost of the decoder."""
    encode_cloud: Fraction = 1 / 16
    """Share of an image's pixels that the encoder sees in a training step, one random cloud for all
    cells. With ``tiled`` attention it sees all of them."""
    encode_scales: Scales | None = None
    """Smallest and largest factor by which the encoder's image is resized, drawn anew each step for
    the height and the width; none does not resize."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise that is added to the latents, so that similar latents
    are decoded to similar images."""
    decode_cloud: Fraction = 1.0
    """Share of the latents that the decoder sees in a training step, one random cloud for all
    points. With ``tiled`` attention a tile sees all latents within its halo."""
    decode_pixels: int = Field(default=256, ge=1)
    """Number of random pixels of each image that a training step decodes, so that its cost does not
    depend on the image's size. With ``tiled`` attention they are whole tiles, at least one."""
    jitter: float = Field(default=1.0, ge=0)
    """Strength of the random displacement of points; 1 is a standard deviation of half a pixel, as
    published."""
