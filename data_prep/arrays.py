"""Datasets that are arrays of pixels, not image files: each image becomes a PNG."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.base import Item
from r2id.data.records import Record, encode_png
from r2id.data.shards import Reject

_PNG_OVERHEAD = 256  # bytes; more than headers and incompressible data can add


@dataclass
class ArrayReader:
    """Splits of images uint8 [N, H, W] with labels [N]."""

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    class_names: list[str]

    @property
    def digest(self) -> str:
        content = hashlib.sha256()
        for name, arrays in sorted(self.splits.items()):
            content.update(name.encode())
            for array in arrays:
                content.update(f"{array.shape}".encode())
                content.update(np.ascontiguousarray(array).data)
        return content.hexdigest()

    def items(self) -> list[Item]:
        """In the order of the arrays."""
        found = []
        for split, (images, labels) in self.splits.items():
            bound = images[0].size + images.shape[1] + _PNG_OVERHEAD
            found += [Item(f"{split}-{number:08d}", split, int(label), str(number), bound)
                      for number, label in enumerate(labels)]
        return found

    def records(self, items: Sequence[Item], rejects: list[Reject]) -> Iterator[Record]:
        for item in items:
            image = self.splits[item.split][0][int(item.place)]
            height, width = image.shape
            yield Record(item.key, encode_png(image), "png", height, width, "L", item.label)
