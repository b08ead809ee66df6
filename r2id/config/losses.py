"""Settings of RIAE's loss: how it is trained, as opposed to what the model is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from r2id.config.section import Fraction, Fraction0, PathField, Scales, Section, Size

PixelLoss = Literal["l1", "mse", "charbonnier"]
"""Losses of colours, each a line of PIXEL_LOSSES in r2id.training.losses.pixel.

l1: the absolute error. mse: the squared error. charbonnier: √(e² + 10⁻⁶), smooth at 0.
"""


class LossConfig(Section):
    """How RIAE's reconstruction error is measured, and on what."""

    pixel: PixelLoss = "mse"
    """Loss of colours that is minimised."""
    texture: float = Field(default=0.0, ge=0)
    """Weight of a second term: the same loss of the colour differences between neighbouring pixels
    (``attention``: between each point and another one, one pixel away in a random direction, which
    doubles the cost of the decoder)."""
    ssim: float = Field(default=0.0, ge=0)
    """Weight of 1 − SSIM, the loss of structure (``lattice``, as are all other terms but
    ``texture``)."""
    spectrum: float = Field(default=0.0, ge=0)
    """Weight of the difference between the power that decoded pictures and their originals have at
    each spatial frequency."""
    perceptual: float = Field(default=0.0, ge=0)
    """Weight of the distance in features of a trained network, as LPIPS measures it."""
    perceptual_file: PathField | None = None
    """File of that network: a TorchScript program, which is run, from pictures [B, 3, H, W] in
    [−1, 1] to features; or a .safetensors file with the weights of a VGG16 or its LPIPS. See
    r2id.training.losses.perceptual."""
    perceptual_size: Size | None = None
    """Height and width to which pictures are resized for that network. Without it, they are shown
    as they are."""
    perceptual_start: int = Field(default=0, ge=0)
    """Step at which this term begins."""
    discriminator: float = Field(default=0.0, ge=0)
    """Weight of the losses of a discriminator, which learns to tell decoded pictures from their
    originals while the decoder learns to deceive it. The discriminator's own losses have this
    weight too, so that both sides share the limit of ``optim.clip``."""
    discriminator_start: int = Field(default=0, ge=0)
    """Step at which both begin to learn from each other."""
    discriminator_width: int = Field(default=32, ge=1)
    """Width of the discriminator at places of 2×2 pixels; twice and four times that at places of
    4×4 and 8×8."""
    discriminator_penalty: float = Field(default=0.1, gt=0)
    """Strength γ of the penalties R1 and R2, which count γ/2 times the squared gradient of the
    discriminator at real and at decoded pictures. Lower it if the loss of the discriminator stays
    at 0.69 = ln 2, which is chance; raise it if that falls far below."""
    freeze_encoder: bool = False
    """Train the decoder alone, so that images keep the latents of the run in ``init_from``
    (``lattice``)."""
    latent_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise that is added to the latents, so that similar latents
    are decoded to similar images."""
    equivariance: Fraction0 = 0.0
    """Share of the steps that resize the latents, and compare what is decoded with equally resized
    images (``lattice``)."""
    equivariance_scales: Scales = (0.25, 1.0)
    """Smallest and largest factor of these, drawn anew each step for the height and the width."""
    magnify: Fraction0 = 0.25
    """Share of the steps that encode smaller copies of the images and decode them at the images'
    own size (``lattice``)."""
    magnify_scales: Scales = (0.5, 1.0)
    """Smallest and largest factor of these copies, drawn anew each step for the height and the
    width."""
    window: Size | None = None
    """Decode a random part of each picture in a training step, at most this high and wide. Without
    it, pictures are decoded whole (``lattice``)."""
    encode_cloud: Fraction = 1 / 16
    """Share of an image's pixels that the encoder sees in a training step, one random cloud for all
    cells (``attention``, as are the settings below)."""
    decode_cloud: Fraction = 1.0
    """Share of the latents that the decoder sees in a training step, one random cloud for all
    points."""
    decode_pixels: int = Field(default=256, ge=1)
    """Number of random pixels of each image that a training step decodes, so that its cost does not
    depend on the image's size."""
    jitter: float = Field(default=1.0, ge=0)
    """Strength of the random displacement of points; 1 is a standard deviation of half a pixel, as
    published."""

    @model_validator(mode="after")
    def _perceptual_by_file(self) -> LossConfig:
        if self.perceptual and self.perceptual_file is None:
            raise ValueError(
                f"perceptual = {self.perceptual}: needs perceptual_file, the network's file"
            )
        return self

    def foreign_to(self, kind: str) -> list[str]:
        """Return the settings that are changed here and belong to another kind of RIAE."""
        names = _ATTENTION if kind == "lattice" else _LATTICE
        return [
            name for name in names if getattr(self, name) != type(self).model_fields[name].default
        ]


_LATTICE = (
    "ssim",
    "spectrum",
    "perceptual",
    "perceptual_file",
    "perceptual_size",
    "perceptual_start",
    "discriminator",
    "discriminator_start",
    "discriminator_width",
    "discriminator_penalty",
    "freeze_encoder",
    "equivariance",
    "equivariance_scales",
    "magnify",
    "magnify_scales",
    "window",
)
_ATTENTION = ("encode_cloud", "decode_cloud", "decode_pixels", "jitter")
"""Settings of one kind of RIAE alone."""
