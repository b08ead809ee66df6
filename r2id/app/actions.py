"""What the web page does with a model: pictures, windows of them, edits and reconstructions.

Latents of what was drawn last are kept, so that the same picture at another size, or a window of
it, only needs the decoder.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r2id.data.pixels import decoding, open_header
from r2id.errors import InputError
from r2id.images import psnr, read_image
from r2id.models.coords import Size, Window
from r2id.pipeline import Pipeline
from r2id.sampling.memory import check_reconstruction, check_samples
from r2id.sampling.pictures import to_picture

LARGEST = 2048
"""Largest height and width that the page offers, in pixels."""
MOST_PIXELS = 16_000_000
"""Pixels of an uploaded picture, at most."""
_KEPT = 64
"""Latents that are kept, at most."""
_VIEW = 512
"""Longer side of a zoomed view, in pixels."""
_FIRST = 128
"""Shorter side of the first picture, at least."""
_GALLERY = ((1, 1), (2, 2), (4, 4), (3, 2), (2, 3), (2, 1), (1, 2))
"""Sizes of the gallery, as multiples of the training images' height and width."""


@dataclass(frozen=True)
class DrawRequest:
    """A picture to draw."""

    seed: int
    guidance: float
    steps: int
    autoguidance: float = 0.0
    label: int | None = None
    attributes: tuple[str, ...] = ()
    """Names of attributes that it has, and with a minus those that it lacks."""

    def settings(self) -> dict[str, Any]:
        """Return these as keywords of Pipeline's methods."""
        return {
            "label": self.label,
            "attributes": self.attributes,
            "seed": self.seed,
            "guidance": self.guidance,
            "autoguidance": self.autoguidance,
            "steps": self.steps,
        }


@dataclass
class Actions:
    """Serves one model. One request at a time computes."""

    pipe: Pipeline
    _latents: OrderedDict[tuple[DrawRequest, Size], Tensor] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    @property
    def classes(self) -> int:
        """Number of classes; 0 for a model without."""
        return self.pipe.sampler.num_classes

    @property
    def first_size(self) -> Size:
        """The size that the page begins with: the training images', times a whole number."""
        height, width = self.pipe.codec.image
        times = max(1, math.ceil(_FIRST / min(height, width)))
        return min(LARGEST, height * times), min(LARGEST, width * times)

    @property
    def conditional(self) -> bool:
        """Whether the model was trained with conditions, without which guidance does nothing."""
        return self.pipe.sampler.model.conditional

    @property
    def has_guide(self) -> bool:
        """Whether the model has a guide, without which there is no autoguidance."""
        return self.pipe.sampler.guide is not None

    @property
    def has_autoencoder(self) -> bool:
        """Whether the model has an RIAE: one that diffuses pixels has none."""
        return self.pipe.codec.riae is not None

    @property
    def first_request(self) -> DrawRequest:
        """The picture that the page begins with."""
        defaults = self.pipe.sampler.defaults
        guidance = defaults.guidance if self.conditional else 1.0
        label = 0 if self.classes else None
        return DrawRequest(0, guidance, defaults.steps, defaults.autoguidance, label)

    def draw(self, request: DrawRequest, size: Size) -> Image.Image:
        """Draw a picture of a size (height, width)."""
        with self._lock:
            check_samples(self.pipe.sampler, size, None, 1)
            return to_picture(self.pipe.sampler.render(self._of(request, size), size)[0])

    def zoom(
        self, request: DrawRequest, size: Size, factor: float, centre: tuple[float, float]
    ) -> Image.Image:
        """Draw a window of a picture, ``factor`` times as large as the whole would fill the view.

        ``centre`` (y, x) is its middle, 0 to 1 of the picture's height and width.
        """
        if not 1 <= factor <= 64:
            raise InputError(f"zoom {factor}: must be 1 to 64")
        scale = _VIEW / max(size)
        view = tuple(max(1, round(side * scale)) for side in size)
        whole: Size = (round(view[0] * factor), round(view[1] * factor))
        window = _window(whole, (view[0], view[1]), centre)
        with self._lock:
            latents = self._of(request, size)
            check_reconstruction(self.pipe.codec, _grid(latents), whole, window)
            native = self.pipe.sampler.native_size(latents, size)
            return self.pipe.decode(latents, whole, window, native)[0]

    def gallery(self, request: DrawRequest) -> list[tuple[Image.Image, str]]:
        """Draw one picture at many sizes → pictures with their sizes as captions."""
        height, width = self.first_size
        sizes = [
            (min(LARGEST, height * down // 2), min(LARGEST, width * across // 2))
            for down, across in _GALLERY
        ]
        return [(self.draw(request, size), f"{size[0]} × {size[1]}") for size in sizes]

    def inpaint(self, picture: Image.Image, mask: Image.Image, request: DrawRequest) -> Image.Image:
        """Draw the white parts of a mask anew."""
        with self._lock:
            return self.pipe.inpaint(picture, mask, **request.settings())

    def outpaint(self, picture: Image.Image, size: Size, request: DrawRequest) -> Image.Image:
        """Continue a picture to a larger size, around its middle."""
        with self._lock:
            return self.pipe.outpaint(picture, size, **request.settings())

    def vary(self, picture: Image.Image, strength: float, request: DrawRequest) -> Image.Image:
        """Draw a picture like another one."""
        with self._lock:
            return self.pipe.vary(picture, strength, **request.settings())

    def upload(self, path: str) -> Image.Image:
        """Read an uploaded picture. Raises InputError for what is none, or too large."""
        file = Path(path)
        try:
            with decoding():
                opened = open_header(file.read_bytes(), MOST_PIXELS)
                opened.close()
        except ValueError as error:
            raise InputError(f"this file cannot be used: {error}") from None
        return to_picture(read_image(file, self.pipe.codec.channels))

    def autoencode(
        self, picture: Image.Image, size: Size
    ) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """Encode a picture and decode it.

        Returns its latents as a picture, the reconstruction at a size, the error at its own size,
        and a sentence about them.
        """
        codec = self.pipe.codec
        with self._lock:
            own: Size = (picture.height, picture.width)
            latents = self.pipe.encode(picture)
            check_reconstruction(codec, _grid(latents), size, None)
            image = self.pipe.read(picture)[None]
            again = codec.decode(latents, own, native=own).cpu()
            drawn = self.pipe.decode(latents, size, native=own)[0]
        error = again - image
        shown = to_picture((error.abs().mean(1, keepdim=True) * 4 - 1).clamp(max=1)[0])
        grid = latents.shape[2:]
        words = (
            f"{own[0]} × {own[1]} pixels are {grid[0]} × {grid[1]} latent cells of "
            f"{latents.shape[1]} channels. At its own size the reconstruction has "
            f"{float(psnr(error.square().mean())):.1f} dB."
        )
        return _latents_picture(codec.normalise(latents)[0].cpu()), drawn, shown, words

    def _of(self, request: DrawRequest, size: Size) -> Tensor:
        """Return the latents of a picture for a size, drawn now or kept."""
        sampler = self.pipe.sampler
        grid = sampler.grid_for(size)
        key = request, grid
        if key not in self._latents:
            condition = self.pipe.condition(request.label, request.attributes, None, 1)
            self._latents[key] = sampler.latents(
                condition,
                torch.tensor([request.seed]),
                grid,
                guidance=request.guidance,
                autoguidance=request.autoguidance,
                steps=request.steps,
            )
            while len(self._latents) > _KEPT:
                self._latents.popitem(last=False)
        self._latents.move_to_end(key)
        return self._latents[key]


def mask_of(layers: list[np.ndarray]) -> Image.Image:
    """Return what was painted on layers, uint8 [H, W, 4], as a mask: white where there is paint."""
    painted = np.zeros(layers[0].shape[:2], dtype=bool)
    for layer in layers:
        painted |= layer[..., 3] > 0
    return Image.fromarray((painted * 255).astype(np.uint8))


def _grid(latents: Tensor) -> Size:
    return latents.shape[2], latents.shape[3]


def _window(whole: Size, view: Size, centre: tuple[float, float]) -> Window:
    """Return the window of a view's size around a centre, moved into the picture."""
    starts = [
        min(max(0, round(side * middle - seen / 2)), side - seen)
        for side, seen, middle in zip(whole, view, centre, strict=True)
    ]
    return starts[0], starts[1], starts[0] + view[0], starts[1] + view[1]


def _latents_picture(latents: Tensor) -> Image.Image:
    """Show normalised latents [L, h, w] in their three directions of most variance, enlarged."""
    values = latents.flatten(1).T
    values = values - values.mean(0)
    count = min(3, *values.shape)
    _, _, directions = torch.linalg.svd(values, full_matrices=False)
    seen = values @ directions[:count].T
    seen = seen / seen.abs().amax(0).clamp(min=1e-6)
    seen = torch.nn.functional.pad(seen, (0, 3 - count))
    image = seen.T.reshape(1, 3, *latents.shape[1:])
    times = max(1, 128 // max(latents.shape[1:]))
    return to_picture(image[0].repeat_interleave(times, 1).repeat_interleave(times, 2))
