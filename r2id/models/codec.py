"""A trained RIAE as a codec: images to latents and back, with the statistics that normalise them.

Shape letters: B batch · C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from r2id.checkpoints.pretrained import About, pack
from r2id.checkpoints.trained import Trained, about, open_trained, read_section
from r2id.config import DataConfig, RiaeConfig
from r2id.errors import InputError
from r2id.models.coords import OnProgress, Size, Window
from r2id.models.pixels import DOWNSAMPLE, STD, Pixels
from r2id.models.riae import RIAE

PIXELS = "pixels"
"""Identity and name of the codec that has no RIAE: R2ID diffuses pixels."""


@dataclass(frozen=True)
class Codec:
    """A trained RIAE, or the images themselves in its place."""

    model: RIAE | Pixels
    mean: Tensor
    """Mean of the raw latents over the training images, float32 [L]."""
    std: Tensor
    """Their standard deviation, float32 [L]."""
    bfloat16: bool
    """Compute in bfloat16 autocast, as the RIAE was trained, instead of float32."""
    source: Trained | None
    """What the RIAE was loaded from, a checkpoint or an exported file; None for pixels."""
    about: About | None
    """Its metadata as those of an exported file; None for pixels."""
    image: Size
    """Median height and width of the training images: the R2ID's, if this is the codec of one."""
    data: DataConfig
    """How the RIAE's training images were prepared."""

    @classmethod
    def load(cls, source: Trained | Path | str, device: torch.device | str = "cpu") -> Codec:
        """Load an RIAE from its checkpoint or run directory, or from an exported file.

        Raises InputError when that is none, is of another stage, or is damaged.
        """
        trained = open_trained(source, "riae")
        meta = trained.meta
        model = RIAE.from_pretrained(trained)
        channels = model.config.latent_channels
        # Not measured for an average that was made afterwards, which is no codec for R2ID.
        stats = trained.statistics() or {"mean": torch.zeros(channels), "std": torch.ones(channels)}
        model.to(device).requires_grad_(False)
        return cls(
            model,
            stats["mean"].to(device),
            stats["std"].to(device),
            meta.config["train"]["precision"] != "float32",
            trained,
            about(trained),
            tuple(meta.model["image"]),
            read_section(trained, "data", DataConfig),
        )

    @classmethod
    def of_pixels(cls, data: DataConfig, image: Size, device: torch.device | str = "cpu") -> Codec:
        """Make the codec of an R2ID that diffuses pixels instead of latents.

        ``image`` is the median size of the training images.
        """
        mean = torch.zeros(data.channels, device=device)
        return cls(
            Pixels(data.channels), mean, torch.full_like(mean, STD), False, None, None, image, data
        )

    @classmethod
    def of_r2id(cls, trained: Trained, device: torch.device | str = "cpu") -> Codec:
        """Load the codec of an R2ID: pixels, or the RIAE that it was trained with."""
        meta = trained.meta
        if meta.model["codec"] is None:
            data = read_section(trained, "data", DataConfig)
            return cls.of_pixels(data, tuple(meta.model["image"]), device)
        codec = cls.load(trained.codec(), device)
        image = meta.model.get("image", codec.image)  # newer than some checkpoints
        return replace(codec, image=tuple(image))

    @classmethod
    def of_any(cls, source: Trained | Path | str, device: torch.device | str = "cpu") -> Codec:
        """Load an RIAE itself, or the codec of an R2ID. Raises InputError like ``load``."""
        trained = open_trained(source)
        return (cls.of_r2id if trained.meta.stage == "r2id" else cls.load)(trained, device)

    def export(self) -> bytes | None:
        """Return the RIAE as an exported model, which R2ID's checkpoints hold; None for pixels."""
        if self.about is None:
            return None
        # The weights in memory, because the file that they came from may be gone by now.
        state = self.model.state_dict()
        return pack(self.about, {name: value.cpu().contiguous() for name, value in state.items()})

    @property
    def identity(self) -> str:
        """The identity of the RIAE's checkpoint, or "pixels"."""
        return self.source.identity if self.source else PIXELS

    @property
    def name(self) -> str:
        """The codec's name in messages: the path of the RIAE's checkpoint or file, or "pixels"."""
        return str(self.source.path) if self.source else PIXELS

    @property
    def riae(self) -> RiaeConfig | None:
        """Config of the RIAE; None for pixels."""
        return self.model.config if isinstance(self.model, RIAE) else None

    def check_riae(self, work: str) -> None:
        """Raise InputError for pixels: ``work`` needs an RIAE, and resizing would pass for it."""
        if self.riae is None:
            raise InputError(
                f"{work}: this R2ID diffuses pixels: it has no autoencoder; must be an RIAE, or an "
                "R2ID of latents"
            )

    @property
    def downsample(self) -> float:
        """Side of a latent cell in pixels."""
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
        """Return the latent grid of an image of this size."""
        return self.model.grid_for(image)

    def size_of(self, grid: Size, like: Size) -> Size:
        """Return the size of a picture that has this latent grid: ``like`` itself if it has.

        Else it is the largest of that shape that fills the grid, and else all of the grid's cells.
        """
        points = grid[0] * self.downsample, grid[1] * self.downsample
        scale = min(points[0] / like[0], points[1] / like[1])
        scaled = max(1, round(like[0] * scale)), max(1, round(like[1] * scale))
        whole = round(points[0]), round(points[1])
        return next((size for size in (like, scaled) if self.grid_for(size) == grid), whole)

    def encode(
        self, images: Tensor, native: Size | None = None, advance: OnProgress | None = None
    ) -> Tensor:
        """Encode images [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w]; see RIAE.encode."""
        with self._autocast():
            return self.model.encode(images.to(self.device), native, advance)

    def decode(
        self,
        latents: Tensor,
        size: Size,
        window: Window | None = None,
        native: Size | None = None,
        advance: OnProgress | None = None,
    ) -> Tensor:
        """Decode raw latents [B, L, h, w] → images [B, C, H, W], clipped to [−1, 1].

        With ``window``, only that part of the images; ``native`` is the size of the images that
        were encoded. See RIAE.decode.
        """
        with self._autocast():
            images = self.model.decode(latents.to(self.device), size, window, native, advance)
            return images.clamp(-1, 1)

    def normalise(self, latents: Tensor) -> Tensor:
        """Scale raw latents [B, L, h, w] to mean 0 and standard deviation 1 in each channel."""
        mean, std = (rearrange(part, "l -> l 1 1") for part in (self.mean, self.std))
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Invert normalise: scaled latents [B, L, h, w] → raw ones."""
        mean, std = (rearrange(part, "l -> l 1 1") for part in (self.mean, self.std))
        return latents * std + mean

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16)


def open_finetuned_riae(source: Path, r2id: Trained) -> Trained:
    """Open an RIAE that can decode what an R2ID of latents draws, in place of its own RIAE.

    It gives images the same latents: both have the same settings and encoder, and only the decoder
    was trained on. Raises InputError where that is not so.
    """
    if r2id.meta.model.get("codec") is None:
        raise InputError(f"--riae: goes with an R2ID of latents, and {r2id.path} is none")
    own, other = Codec.of_r2id(r2id), Codec.load(source)
    assert own.source and other.source
    assert isinstance(own.model, RIAE) and isinstance(other.model, RIAE)
    for name, wanted in own.model.config:
        if (found := getattr(other.model.config, name)) != wanted:
            raise InputError(
                f"--riae {other.source.path}: has riae.{name} = {found}; must have {wanted}, as "
                f"{own.source.path}"
            )
    weights, others = (riae.parts.encoder.state_dict() for riae in (own.model, other.model))
    for name, value in weights.items():
        if not torch.equal(value, others[name]):
            raise InputError(
                f"--riae {other.source.path}: has another encoder than {own.source.path}: {name}; "
                "must be trained on from that with loss.freeze_encoder = true"
            )
    return other.source
