"""Make records of image files. Readers of folders and of archives share this module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.items import Item
from data_prep.paired_embeddings import split_place
from data_prep.sources import Source
from r2id.data.embeddings import parse_npy, to_stored
from r2id.data.manifest import Reject
from r2id.data.records import Record, as_png, inspect
from r2id.errors import InputError

_BYTES_PER_PIXEL = 16
"""More than any format takes per pixel, even uncompressed; larger files are not read."""


def image_record(
    item: Item,
    data: bytes,
    max_pixels: int,
    meta: Mapping[str, Any],
    attributes: tuple[int, ...] | None = None,
    embedding: np.ndarray | None = None,
) -> Record:
    """Make an item's record from the bytes of its image, which is decoded completely.

    JPEG, PNG and WebP keep their bytes, whatever their names say; other formats become PNG. Raises
    ValueError with the reason when the bytes are not a readable image of at most ``max_pixels``.
    """
    facts = inspect(data, max_pixels)
    if facts.ext is None:
        data = as_png(data)
    return Record(
        item.key,
        data,
        facts.ext or "png",
        facts.height,
        facts.width,
        facts.mode,
        item.label,
        dict(meta),
        attributes,
        embedding,
    )


def embedding_of(data: bytes, shape: Sequence[int]) -> np.ndarray:
    """Parse the content of a ``.npy`` file; ValueError when its embedding has another shape."""
    try:
        return to_stored(parse_npy(data), shape)
    except ValueError as error:
        raise ValueError(f"its embedding: {error}") from None


class FileRecords:
    """Base of readers whose items are files of a Source; subclasses add the listing."""

    def __init__(self, source: Source, max_pixels: int) -> None:
        self.source, self.max_pixels = source, max_pixels

    def records(
        self,
        items: Sequence[Item],
        rejects: list[Reject],
        newest: int,
        embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """See data_prep.items.Reader."""
        for item in items:
            place, embedding_place = split_place(item.place)
            name = self.source.name(place)
            try:
                check_length(item.size, self.max_pixels)
                data = self.source.read(place, item.size, newest)
                embedding = (
                    embedding_of(self.source.read(*embedding_place, newest), embedding_shape)
                    if embedding_place
                    else None
                )
                yield image_record(
                    item,
                    data,
                    self.max_pixels,
                    {"source": name, **self.meta(name)},
                    self.attributes(name),
                    embedding,
                )
            except InputError:  # a fault of the whole source, not of one image
                raise
            except ValueError as error:
                rejects.append(Reject(item.split, name, str(error)))

    def meta(self, _name: str) -> dict[str, Any]:
        """Return further facts about a file, to be stored in the sample's JSON."""
        return {}

    def attributes(self, _name: str) -> tuple[int, ...] | None:
        """Return the values of the set's attributes for a file, if it has any."""
        return None


def check_length(size: int, max_pixels: int) -> None:
    """Raise ValueError when a file is longer than any image of ``max_pixels`` could be."""
    limit = max_pixels * _BYTES_PER_PIXEL
    if size > limit:
        raise ValueError(
            f"{size} bytes, more than an image of the pixels allowed can have ({limit})"
        )
