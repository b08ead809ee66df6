"""RIAE: an autoencoder of pictures of any size, which knows places by coordinates.

To encode, the cells of a latent grid read the picture; to decode, pixels of any size, anywhere, are
drawn from the latents. Two kinds exist: r2id.models.lattice, and r2id.models.attention_encoder with
attention_decoder. To add one, write an encoder and a decoder with the methods of LatticeEncoder and
LatticeDecoder that RIAE calls (encode, decode and blocks), add a line to KINDS, add its name to
RiaeConfig.kind in r2id/config/models.py, and add its loss to r2id/training/losses/riae.py.

Shape letters: B batch · C colours · H, W image size · h, w latent grid · L latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from r2id.checkpoints.trained import Trained, open_trained, read_section
from r2id.config import RiaeConfig
from r2id.models.attention_decoder import AttentionDecoder
from r2id.models.attention_encoder import AttentionEncoder
from r2id.models.coords import OnProgress, Size, Window
from r2id.models.lattice import LatticeDecoder, LatticeEncoder


class Parts(NamedTuple):
    """An encoder and a decoder of one kind, of the classes that KINDS names."""

    encoder: Any
    decoder: Any


def _attention(config: RiaeConfig, channels: int) -> Parts:
    return Parts(AttentionEncoder(config, channels), AttentionDecoder(config, channels))


def _lattice(config: RiaeConfig, channels: int) -> Parts:
    return Parts(LatticeEncoder(config, channels), LatticeDecoder(config, channels))


KINDS: dict[str, Callable[[RiaeConfig, int], Parts]] = {
    "lattice": _lattice,
    "attention": _attention,
}
"""Value of ``riae.kind`` → a function that makes the encoder and the decoder."""


class RIAE(nn.Module):
    """An encoder and a decoder of one kind."""

    def __init__(self, config: RiaeConfig, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        # Checkpoints, optimizer states and averages name layers without "encoder." and "decoder."
        # in front. So the layers are registered here, under those names, and the two parts that own
        # them are kept in a tuple, where PyTorch does not look for modules.
        self.parts = KINDS[config.kind](config, channels)
        for part in self.parts:
            for name, layer in part.named_children():
                self.add_module(part.stored_as.get(name, name), layer)

    @classmethod
    def from_pretrained(cls, source: Trained | Path | str) -> RIAE:
        """Load a trained model: a run directory, a checkpoint, or an exported file or folder.

        An exported R2ID holds its RIAE, which is loaded then; ``owner/name`` is one of the Hugging
        Face Hub. The model is float32, on the CPU, ready for inference; r2id.models.codec.Codec has
        the statistics of its latents, too. Raises InputError when there is no such model, or it is
        damaged or another.
        """
        trained = open_trained(source, "riae")
        model = cls(read_section(trained, "riae", RiaeConfig), trained.meta.model["channels"])
        trained.load_ema(model)
        return model.eval()

    def blocks(self) -> list[nn.Module]:
        """The modules whose activations may be recomputed."""
        return [block for part in self.parts for block in part.blocks()]

    def grid_for(self, image: Size) -> Size:
        """Latent grid (h, w) of an image (H, W) at its own size; see RiaeConfig.downsample."""
        return self.config.grid_for(image)

    @torch.no_grad()
    def encode(
        self, image: Tensor, native: Size | None = None, advance: OnProgress | None = None
    ) -> Tensor:
        """Encode images [B, C, H, W] in [−1, 1] → raw latents [B, L, h, w].

        The latent grid is that of the images' size; or of ``native``, if the images are pictures of
        that size that were resized. ``advance`` is called with numbers of encoded native pixels.
        """
        return self.parts.encoder.encode(image, native or (image.shape[2], image.shape[3]), advance)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        size: Size,
        window: Window | None = None,
        native: Size | None = None,
        advance: OnProgress | None = None,
    ) -> Tensor:
        """Decode raw latents [B, L, h, w] → images [B, C, H, W] of any size.

        They are nominally in [−1, 1], but not clipped. Where they are larger than ``native``, the
        means of their pixels are nearly the colours of the picture at its native size, clipped
        (kind ``lattice``).
        With a window (y0, x0, y1, x1), only its pixels are rendered: [B, C, y1 − y0, x1 − x0].
        ``native`` is the size of the images that were encoded, beyond which cells at the border may
        extend; see r2id.models.cells.native_size for its default. Raises InputError when the
        window is not within the image, or native is no size of this grid. ``advance`` is called
        with numbers of rendered pixels.
        """
        return self.parts.decoder.decode(latents, size, window, native, advance)
