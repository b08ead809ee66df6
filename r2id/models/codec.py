"""A trained RIAE as a codec: images to latents and back, and the one place where latents are normalised.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from r2id.checkpoints import checkpoint
from r2id.checkpoints.files import Meta
from r2id.config import DataConfig, RiaeConfig
from r2id.errors import InputError
from r2id.models.coords import Size, Window
from r2id.models.pixels import DOWNSAMPLE, STD, Pixels
from r2id.models.riae import RIAE

PIXELS_HASH = "pixels"


@dataclass(frozen=True)
class Codec:
    model: RIAE | Pixels
    mean: Tensor
    """Mean of the raw latents over the training images, float32 [L]."""
    std: Tensor
    """Their standard deviation, float32 [L]."""
    bfloat16: bool
    """Computes as the RIAE was trained: in bfloat16 autocast, or in float32."""
    path: Path
    """The RIAE's checkpoint; of pixels, the R2ID's own run or checkpoint."""
    hash: str
    """Identity of the checkpoint; "pixels" where there is none."""
    image: Size
    """Size of the training images: their median height and width."""
    data: DataConfig
    """How the training images were prepared."""

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> Codec:
        """From an RIAE checkpoint or run directory; InputError when it is none or is damaged."""
        path = checkpoint.resolve(path)
        meta = checkpoint.load_meta(path)
        if meta.stage != "riae":
            raise InputError(f"{path}: a checkpoint of stage {meta.stage!r}, not 'riae'")
        model = RIAE(RiaeConfig.model_validate(meta.config["riae"]), meta.model["channels"])
        checkpoint.fit(model, checkpoint.load_tensors(path, "ema"), path)
        stats = checkpoint.load_tensors(path, "stats")
        model.to(device).eval().requires_grad_(False)
        return cls(
            model,
            stats["mean"].to(device),
            stats["std"].to(device),
            meta.config["train"]["precision"] != "float32",
            path,
            checkpoint.identity(path),
            tuple(meta.model["image"]),
            DataConfig.model_validate(meta.config["data"]),
        )

    @classmethod
    def of_pixels(
        cls, path: Path, data: DataConfig, image: Size, device: torch.device | str = "cpu"
    ) -> Codec:
        """No RIAE: the images themselves, for the R2ID at a path, which was trained on images of this (median) size."""
        mean = torch.zeros(data.channels, device=device)
        return cls(
            Pixels(data.channels),
            mean,
            torch.full_like(mean, STD),
            False,
            path,
            PIXELS_HASH,
            image,
            data,
        )

    @property
    def riae(self) -> RiaeConfig | None:
        """None where the codec is no RIAE."""
        return self.model.config if isinstance(self.model, RIAE) else None

    @property
    def downsample(self) -> float:
        """Pixels per side of a latent cell."""
        return DOWNSAMPLE if self.riae is None else self.riae.downsample

    @property
    def channels(self) -> int:
        """Colour channels."""
        return self.model.channels

    @property
    def latent_channels(self) -> int:
        return self.channels if self.riae is None else self.riae.latent_channels

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def grid_for(self, image: Size) -> Size:
        """The latent grid of an image of this size."""
        return self.model.grid_for(image)

    def encode(self, images: Tensor, grid: Size | None = None) -> Tensor:
        """Images [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w]."""
        with self._autocast():
            return self.model.encode(images.to(self.device), grid)

    def decode(self, latents: Tensor, size: Size, window: Window | None = None) -> Tensor:
        """Raw latents [B, L, h, w] → images [B, C, H, W] clipped to [−1, 1], or a window of them; see RIAE.decode."""
        with self._autocast():
            return self.model.decode(latents.to(self.device), size, window).clamp(-1, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Raw latents [B, L, h, w] → mean 0 and standard deviation 1 per channel."""
        mean, std = (rearrange(part, "l -> l 1 1") for part in (self.mean, self.std))
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of normalise."""
        mean, std = (rearrange(part, "l -> l 1 1") for part in (self.mean, self.std))
        return latents * std + mean

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def load_codec(path: Path, meta: Meta, device: torch.device | str) -> Codec:
    """The codec of an R2ID checkpoint: its RIAE, recorded relative to the run directory, so that both move together, or
    pixels."""
    if meta.model["codec"] is None:
        return Codec.of_pixels(
            path, DataConfig.model_validate(meta.config["data"]), tuple(meta.model["image"]), device
        )
    return Codec.load(path.parent.parent / meta.model["codec"], device)
