"""The loss of an RIAE on a lattice: a module from a batch to (loss, figures by name).

Pictures are encoded whole; whole pictures or windows of them are decoded and compared. Each step is
one of three kinds, drawn at random and the same for the whole batch:

* A plain step encodes images at their own size and decodes them at that size.
* A step of ``magnify`` encodes smaller copies of the images and decodes them at the images' own
  size, so that the decoder learns what lies between lattice points.
* A step of ``equivariance`` resizes the latents and compares what is decoded with resized images,
  so that latents of any size make sense to a diffusion model (EQ-VAE, Kouzelis et al. 2025,
  arXiv:2502.09509).

Pictures are compared in several ways, each with its weight. To add one, add its weight to
LossConfig in r2id/config/losses.py, write it in a module beside this one, and add it to
WindowLoss._picture_loss.

Every random draw is keyed by (seed, step, sample), so that the loss depends neither on the batch
that a sample is in nor on how often training was interrupted.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from r2id import rng
from r2id.config import LossConfig
from r2id.config.losses import PixelLoss
from r2id.images import resize
from r2id.models.cells import on_lattice
from r2id.models.coords import WHOLE, Part, Size
from r2id.models.riae import RIAE
from r2id.training.losses.discriminator import Discriminator, adversarial_terms, nothing
from r2id.training.losses.perceptual import load_perceptual
from r2id.training.losses.pixel import reconstruction_loss
from r2id.training.losses.spectrum import spectrum_loss
from r2id.training.losses.ssim import ssim_loss
from r2id.training.losses.streams import Stream

_FACTORS = 8  # how many different factors a side may be scaled by


class WindowLoss(nn.Module):
    """Error of pictures decoded from the latents of images, whole or in windows."""

    def __init__(self, model: RIAE, config: LossConfig, seed: int) -> None:
        super().__init__()
        self.model, self.config, self.seed = model, config, seed
        self.perceptual = load_perceptual(config)
        self.discriminator = (
            Discriminator(model.channels, config.discriminator_width, config.discriminator_start)
            if config.discriminator
            else None
        )
        self.frozen = [*model.parts.encoder.parameters()] if config.freeze_encoder else []

    def forward(self, image: Tensor, index: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """image [B, C, H, W] in [−1, 1], index [B] of the samples → scalar loss, figures.

        ``index`` numbers samples, to key their random draws; see image_loader's "draw".
        """
        config, size = self.config, (image.shape[2], image.shape[3])
        kind = rng.number(self.seed, step, Stream.STEP_KIND)
        resized = kind < config.equivariance
        smaller = not resized and kind < config.equivariance + config.magnify
        native = size
        if smaller:
            native = random_size(size, config.magnify_scales, self.seed, step, Stream.SMALLER)
        grid, cell = self.model.grid_for(native), self.model.config.cell
        lattice = on_lattice(image, native, cell)
        latents = self.model.parts.encoder(lattice)
        if config.freeze_encoder:
            # Engines want a gradient of every weight in every step: here it is 0.
            latents = latents.detach() + 0 * latents
        given = self._disturbed(latents, rng.fold(self.seed, step, index))
        truth = image
        if resized:
            other = random_size(
                grid, config.equivariance_scales, self.seed, step, Stream.LATENT_SCALE
            )
            given = resize(given, other)
            size = native = other[0] * cell, other[1] * cell
            truth = resize(lattice, size)
        part = self._window(size, step)
        decoded = self.model.parts.decoder.render(given, size, native, part)
        truth = truth[:, :, part[0], part[1]]
        pixel = native[0] / size[0], native[1] / size[1]
        loss, figures = self._picture_loss(decoded, truth, pixel, step)
        return loss, {
            **figures,
            "mse": reconstruction_loss(decoded.detach(), truth, "mse"),
            "latent_rms": latents.detach().square().mean().sqrt(),
        }

    def _disturbed(self, latents: Tensor, rng_keys: Tensor) -> Tensor:
        """Add noise to latents [B, L, h, w]."""
        if not self.config.latent_noise:
            return latents
        keys = rng.fold(rng_keys, Stream.WINDOW_NOISE)
        noise = rng.normal(keys, *latents.shape[1:], device=latents.device)
        return latents + self.config.latent_noise * noise

    def _window(self, size: Size, step: int) -> Part:
        """Choose the part of pictures of a size that is decoded in a step."""
        window = self.config.window
        if window is None:
            return WHOLE
        starts = (
            int(rng.number(self.seed, step, Stream.WINDOW, axis) * (max(0, side - most) + 1))
            for axis, (side, most) in enumerate(zip(size, window, strict=True))
        )
        rows, columns = (
            slice(start, min(side, start + most))
            for start, side, most in zip(starts, size, window, strict=True)
        )
        return rows, columns

    def _picture_loss(
        self, decoded: Tensor, truth: Tensor, pixel: tuple[float, float], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compare pictures → the weighted sum of all terms, and each term by name.

        ``pixel``: height and width of a pixel, in pixels of the image that was encoded.
        """
        config = self.config
        terms = {"pixel": (1.0, reconstruction_loss(decoded, truth, config.pixel))}
        if config.texture:
            terms["texture"] = config.texture, texture_loss(decoded, truth, config.pixel)
        if config.ssim:
            terms["ssim"] = config.ssim, ssim_loss(decoded, truth)
        if config.spectrum:
            terms["spectrum"] = config.spectrum, spectrum_loss(decoded, truth)
        if self.perceptual and step >= config.perceptual_start:
            terms["perceptual"] = config.perceptual, self.perceptual(decoded, truth)
        terms |= self._adversarial_terms(decoded, truth, pixel, step)
        loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
        return loss, {name: value.detach() for name, (_, value) in terms.items()}

    def _adversarial_terms(
        self, decoded: Tensor, truth: Tensor, pixel: tuple[float, float], step: int
    ) -> dict[str, tuple[float, Tensor]]:
        """Let the decoder and the discriminator compete → weights and terms by name."""
        network, weight = self.discriminator, self.config.discriminator
        if network is None:
            return {}
        if step < network.start:
            return {"discriminator": (weight, nothing(network))}
        terms = adversarial_terms(network, decoded, truth, pixel)
        penalty = weight * self.config.discriminator_penalty / 2
        return {
            "generator": (weight, terms.generator),
            "discriminator": (weight, terms.discriminator),
            "r1": (penalty, terms.r1),
            "r2": (penalty, terms.r2),
        }


def random_size(size: Size, scales: tuple[float, float], *key: int) -> Size:
    """Multiply a height and a width by random factors within ``scales``; at least 1×1.

    The random key makes the factors the same for the whole batch.
    """
    # Few factors, evenly spaced by logarithm: PyTorch prepares and keeps kernels for every shape
    # that it meets, about a gigabyte on a CPU for a thousand shapes.
    places = (int(_FACTORS * rng.number(*key, axis)) / (_FACTORS - 1) for axis in range(2))
    height, width = (
        max(1, round(side * scales[0] * (scales[1] / scales[0]) ** place))
        for side, place in zip(size, places, strict=True)
    )
    return height, width


def texture_loss(decoded: Tensor, truth: Tensor, kind: PixelLoss) -> Tensor:
    """Mean loss of the differences between neighbouring pixels of [B, C, H, W]."""
    error = decoded - truth
    terms = [
        reconstruction_loss(side, torch.zeros_like(side), kind)
        for side in (error.diff(dim=2), error.diff(dim=3))
        if side.numel()
    ]
    return sum(terms, decoded.new_zeros(())) / max(1, len(terms))
