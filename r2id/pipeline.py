"""A trained R2ID in Python: pictures in and out, of any size.

::

    from r2id import Pipeline

    pipe = Pipeline.from_pretrained("runs/digits/r2id")
    images = pipe(labels=[3, 7], size=(48, 32), seeds=[0, 1])
    images[0].save("three.png")

Sizes are (height, width) in pixels. Pictures are those of Pillow, paths of files, uint8 arrays
[H, W] or [H, W, C], or floats [C, H, W] in [−1, 1]: see r2id.sampling.pictures. Results are those
of Pillow, of which ``np.asarray`` makes such arrays, and ``read`` such tensors. A result depends on
its seed, condition, size and settings alone, not on what else is drawn in the same call. Keywords
that several methods take are those of Settings and Drawing. ``callback`` is called with a Step (its
number, the total, and the latents so far, which ``decode`` shows) at each step; an error that it
raises ends the work.

Errors are InputError when what is asked for cannot be done, with one line that says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypedDict, Unpack, get_type_hints

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from r2id.checkpoints.hub import fetch, is_hub_name
from r2id.config import find_labels
from r2id.dist import find_device
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window, check_size
from r2id.sampling import editing
from r2id.sampling.arguments import as_latents, as_list, as_seeds, as_whole
from r2id.sampling.conditions import choose_attributes, choose_embeddings
from r2id.sampling.memory import check_edit, check_reconstruction, check_samples
from r2id.sampling.pictures import Picture, as_pictures, read_mask, read_picture, to_picture
from r2id.sampling.sampler import Sampler
from r2id.sampling.steps import Watch

Embedding = Tensor | np.ndarray | PathLike[str] | str
"""An embedding in the shape that the model was trained on, or the path of a ``.npy`` file of it."""


class Settings(TypedDict, total=False):
    """How pictures are drawn, by default as in the model's config; see SamplerConfig."""

    steps: int
    guidance: float
    autoguidance: float
    guidance_interval: tuple[float, float]
    eta: float
    solver: str


class Drawing(Settings, total=False):
    """What one picture shows, and how it is drawn."""

    label: int | str | None
    """Its class, by name or number; None for none."""
    attributes: Sequence[str]
    """What it has ("Smiling") or lacks ("-Male")."""
    embedding: Embedding | None
    callback: Watch | None
    """Is told each step."""


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A trained R2ID with its RIAE.

    Called, it draws new pictures, of several ``labels``, ``seeds`` and ``embeddings``, which are in
    the plural. Methods that edit a picture take one ``label`` and ``seed``, because they make one
    picture or one series, and the other keywords of Drawing: ``attributes``,
    ``embedding`` and ``callback``. All take those of Settings: ``steps``, ``guidance``,
    ``autoguidance``, ``guidance_interval``, ``eta`` and ``solver``.
    """

    sampler: Sampler

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: torch.device | str = "auto",
        revision: str | None = None,
        cache_dir: Path | str | None = None,
    ) -> Pipeline:
        """Load a model: a run directory, a checkpoint, or an exported file or folder.

        Or one of the Hugging Face Hub by its name, ``owner/name``, of a ``revision``, kept in
        ``cache_dir``: see r2id.checkpoints.hub. ``device`` "auto" is a GPU if there is one. Raises
        InputError when there is no such model or device, or when it is damaged or no R2ID.
        """
        device = find_device(device)
        if is_hub_name(str(source)):
            source = fetch(str(source), revision, cache_dir)
        return cls(Sampler.load(source, device))

    def __repr__(self) -> str:
        size, classes = self.codec.image, self.sampler.num_classes
        sizes = "" if self.sampler.trained_on_one_shape else "several sizes, in the median "
        return (
            f"<Pipeline of pictures of {sizes}{size[0]}x{size[1]}, "
            f"{f'{classes} classes, ' if classes else ''}on {self.codec.device}>"
        )

    @property
    def codec(self) -> Codec:
        """The autoencoder, or the pixels in its place."""
        return self.sampler.codec

    def __call__(
        self,
        labels: int | str | Sequence[int | str] | None = None,
        *,
        size: Size | None = None,
        seeds: int | Sequence[int] = 0,
        attributes: Sequence[str] = (),
        embeddings: Tensor | np.ndarray | None = None,
        grid: Size | None = None,
        callback: Watch | None = None,
        **settings: Unpack[Settings],
    ) -> list[Image.Image]:
        """Draw new pictures.

        labels: a class for each picture, or one for all, by its name or number; None or −1 for none
        · size: by default that of the training images · seeds: one for each picture, or one for all
        · attributes: what all pictures have ("Smiling") or lack ("-Male") · embeddings: [B, …], one
        for each picture · grid: (h, w) of latent cells, by default what suits the size. Where
        several are given for each picture, they are equally many.

        Nothing is added to what is given: without labels there is no class, and one seed is that of
        all pictures, while ``r2id sample`` fills a grid with all classes and a seed for each.
        """
        size = self.codec.image if size is None else size
        chosen_labels = [] if labels is None else as_list("labels", labels)
        given = {"labels": chosen_labels, "seeds": as_list("seeds", seeds)}
        if embeddings is not None:
            given["embeddings"] = list(embeddings)
        counts = {name: len(values) for name, values in given.items() if len(values) > 1}
        if len(set(counts.values())) > 1:
            raise InputError(
                "pictures: as many as "
                + ", ".join(f"{number} {name}" for name, number in counts.items())
                + "; must be equally many, or one for all"
            )
        count = max(counts.values(), default=1)
        own = ("labels", "seeds", "embeddings", "size", "attributes", "grid", "callback")
        _check_names(settings, Settings, own)
        condition = self.condition(chosen_labels or None, attributes, embeddings, count)
        check_samples(self.sampler, size, grid, count)
        chosen = as_seeds(given["seeds"]).expand(count)
        drawn = self.sampler.sample(condition, chosen, size, grid=grid, watch=callback, **settings)
        return [to_picture(image) for image in drawn]

    def encode(self, *pictures: Picture | Sequence[Picture]) -> Tensor:
        """Encode pictures of one size → raw latents [B, L, h, w].

        They are given one by one, as a list, or as one array or tensor with B in front.
        """
        listed = as_pictures(pictures)
        if not listed:
            raise InputError("pictures: there is none; must be at least one")
        images = [self.read(picture) for picture in listed]
        sizes = {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1:
            raise InputError(f"pictures of sizes {sorted(sizes)}: must have one size")
        return self.codec.encode(torch.stack(images))

    def decode(
        self,
        latents: Tensor | np.ndarray,
        size: Size | None = None,
        window: Window | None = None,
        native: Size | None = None,
    ) -> list[Image.Image]:
        """Draw latents [B, L, h, w] at any size, or a window (y0, x0, y1, x1) of that.

        ``size`` is by default where no pixel is resampled; ``native`` is that of pictures that were
        encoded, if it is no multiple of a latent cell.
        """
        latents = as_latents(latents, self.codec.latent_channels)
        grid: Size = (latents.shape[2], latents.shape[3])
        if size is None:
            own = self.codec.grid_for(self.codec.image) == grid
            cell = self.codec.downsample
            size = self.codec.image if own else (round(grid[0] * cell), round(grid[1] * cell))
        if native is not None:
            check_size(native, "native size")
        check_reconstruction(self.codec, grid, size, window, len(latents))
        # One at a time takes little memory, and gives each the same bits in any batch.
        return [
            to_picture(self.codec.decode(one, size, window, native)[0]) for one in latents.split(1)
        ]

    def upscale(self, picture: Picture, size: Size, window: Window | None = None) -> Image.Image:
        """Resize a picture, with the detail that the autoencoder adds to larger ones.

        With a window (y0, x0, y1, x1) of the result, only that is drawn. Raises InputError for an
        R2ID of pixels, which has no autoencoder.
        """
        return to_picture(upscaled(self.codec, self.read(picture), size, window))

    def vary(
        self,
        picture: Picture,
        strength: float = 0.5,
        *,
        seed: int = 0,
        size: Size | None = None,
        **drawing: Unpack[Drawing],
    ) -> Image.Image:
        """Draw a picture like another: strength near 0 changes nearly nothing, 1 all of it."""
        image = self.read(picture)
        self._check_edit(_size(image), size)
        given = self._arguments(seed, drawing)
        varied = editing.vary(self.sampler, image[None], strength=strength, size=size, **given)
        return to_picture(varied[0])

    def inpaint(
        self, picture: Picture, mask: Picture, *, seed: int = 0, **drawing: Unpack[Drawing]
    ) -> Image.Image:
        """Draw a part of a picture anew, to fit the rest, which stays as it is.

        The mask has the picture's size, and is white where pixels are drawn. What is transparent
        counts as black.
        """
        image, masked = self.read(picture), read_mask(mask)
        self._check_edit(_size(image))
        given = self._arguments(seed, drawing)
        return to_picture(editing.inpaint(self.sampler, image[None], masked[None], **given)[0])

    def outpaint(
        self,
        picture: Picture,
        size: Size,
        at: Size | None = None,
        *,
        seed: int = 0,
        **drawing: Unpack[Drawing],
    ) -> Image.Image:
        """Continue a picture beyond its borders, to a larger size.

        It stays as it is, with its top left corner ``at`` (y, x), by default in the middle.
        """
        check_size(size)
        image = self.read(picture)
        own = _size(image)
        self._check_edit(own, within=size)
        at = ((size[0] - own[0]) // 2, (size[1] - own[1]) // 2) if at is None else at
        given = self._arguments(seed, drawing)
        return to_picture(editing.outpaint(self.sampler, image[None], size, at, **given)[0])

    def interpolate(
        self,
        seed: int,
        other: int,
        count: int = 8,
        *,
        size: Size | None = None,
        **drawing: Unpack[Drawing],
    ) -> list[Image.Image]:
        """Draw pictures that go from one seed's to another's, both included."""
        size, count = self.codec.image if size is None else size, as_whole("count", count)
        check_samples(self.sampler, size, None, count)
        given = self._arguments(seed, drawing)
        condition = given.pop("condition")
        given["condition"] = condition.expand(count, *condition.shape[1:])
        given["seeds"] = tuple(as_seeds([seed, other]).tolist())
        images = editing.interpolate(self.sampler, count=count, size=size, **given)
        return [to_picture(image) for image in images]

    def read(self, picture: Picture) -> Tensor:
        """Read a picture, upright, as float32 [C, H, W] in [−1, 1] with the model's channels."""
        return read_picture(picture, self.codec.channels)

    def _check_edit(self, own: Size, size: Size | None = None, within: Size | None = None) -> None:
        """Raise InputError when editing a picture, and drawing it at a size, would not fit."""
        size = (within or own) if size is None else size
        check_size(size)
        native = editing.edited_size(self.sampler, own, within)
        check_edit(self.sampler, size, self.codec.grid_for(native))

    def _arguments(self, seed: int, drawing: Drawing) -> dict[str, Any]:
        """Turn the keywords of one picture into those of r2id.sampling.editing."""
        _check_names(drawing, Drawing, ("seed",))
        settings: dict[str, Any] = dict(drawing)
        embedding = settings.pop("embedding", None)
        if isinstance(embedding, PathLike | str):
            embedding = choose_embeddings(Path(embedding), self.sampler.model, 1)
        elif embedding is not None:
            embedding = torch.as_tensor(embedding)[None]
        condition = self.condition(
            settings.pop("label", None), settings.pop("attributes", ()), embedding, 1
        )
        watch = settings.pop("callback", None)
        return {"condition": condition, "seeds": as_seeds([seed]), "watch": watch, **settings}

    def condition(
        self,
        labels: int | str | Sequence[int | str] | None,
        attributes: Sequence[str],
        embeddings: Tensor | np.ndarray | None,
        count: int,
    ) -> Tensor:
        """Make the condition of ``count`` pictures: of labels, attributes or embeddings, or none.

        Raises InputError for more than one of them, and for what the model was not trained with.
        """
        if sum((labels is not None, bool(attributes), embeddings is not None)) > 1:
            raise InputError("labels, attributes and embeddings exclude each other")
        if attributes:
            if isinstance(attributes, str):
                attributes = [attributes]
            return choose_attributes(attributes, self.sampler.attributes).expand(count, -1)
        model = self.sampler.model
        if embeddings is not None:
            given = torch.as_tensor(embeddings)
            if model.config.condition != "embedding":
                raise InputError("embeddings: the model was not trained with embeddings")
            if tuple(given.shape[1:]) != tuple(model.condition_shape):
                raise InputError(
                    f"embeddings of shape {tuple(given.shape)}: must be [B, "
                    f"{', '.join(map(str, model.condition_shape))}]"
                )
            return given.expand(count, *given.shape[1:])
        chosen = [-1] if labels is None else as_list("labels", labels)
        if len(chosen) not in (1, count):
            allowed = "one" if count == 1 else f"one, or {count}"
            raise InputError(f"labels {chosen}: must be {allowed}")
        classes, names = self.sampler.num_classes, self.sampler.class_names
        numbers = [find_labels([one], classes, names)[0] if one != -1 else -1 for one in chosen]
        return torch.tensor(numbers).expand(count)


def _check_names(settings: Mapping[str, Any], allowed: type, own: Sequence[str]) -> None:
    """Raise InputError for a setting that is none of the keys of a typed dictionary.

    ``own`` are a method's own keywords, which its message names too.
    """
    known = get_type_hints(allowed)
    for name in settings.keys() - known.keys():
        raise InputError(f"{name}: no such setting; must be one of {', '.join((*own, *known))}")


def _size(image: Tensor) -> Size:
    return image.shape[1], image.shape[2]


def upscaled(codec: Codec, image: Tensor, size: Size, window: Window | None = None) -> Tensor:
    """Upscale one image [C, H, W] in [−1, 1], if that fits into memory; see editing.upscale.

    Raises InputError when it does not, and for a codec of pixels, which would only resize.
    """
    codec.check_riae("upscale")
    check_reconstruction(codec, codec.grid_for(_size(image)), size, window)
    return editing.upscale(codec, image[None], size, window)[0]
