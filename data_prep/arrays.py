"""Read datasets that are arrays of pixels, not image files: each image becomes a PNG."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.items import Item, ItemTableBuilder, Listing
from r2id.data.manifest import Reject
from r2id.data.records import Record, encode_png
from r2id.errors import WorkError

_PNG_OVERHEAD = 256  # bytes: more than a PNG's headers take


@dataclass
class ArrayReader:
    """Reads splits of images uint8 [N, H, W] or [N, H, W, 3] with labels [N].

    The arrays may be memory-mapped; see data_prep.items.Reader.
    """

    splits: dict[str, tuple[np.ndarray, np.ndarray]]
    class_names: list[str]
    newest: int = 0
    """Latest modification time of the files, in nanoseconds."""

    def listing(self) -> Listing:
        """List all images in the order of the arrays."""
        items, content = ItemTableBuilder(), hashlib.sha256()
        for split, (images, labels) in self.splits.items():
            pixels = images[0].size
            # PNG adds one byte per row, and less than a thousandth if pixels are incompressible.
            bound = pixels + images.shape[1] + pixels // 1000 + _PNG_OVERHEAD
            for number, label in enumerate(labels):
                items.add(split, int(label), b"%d" % number, bound, key=f"{split}-{number:08d}")
        for name, arrays in sorted(self.splits.items()):
            content.update(name.encode())
            for array in arrays:
                content.update(f"{array.shape}".encode())
                content.update(np.ascontiguousarray(array).data)
        height, width = next(iter(self.splits.values()))[0].shape[1:3]
        return Listing(
            items.table(),
            content.hexdigest(),
            self.newest,
            self.class_names,
            notes=[f"arrays of {height}x{width}"],
            hashed=True,
        )

    def records(
        self,
        items: Sequence[Item],
        _rejects: list[Reject],
        newest: int,
        _embedding_shape: Sequence[int],
    ) -> Iterator[Record]:
        """See data_prep.items.Reader."""
        if self.newest > newest:
            raise WorkError("the source changed since the preparation began")
        for item in items:
            image = self.splits[item.split][0][int(item.place)]
            height, width = image.shape[:2]
            mode = "L" if image.ndim == 2 else "RGB"
            yield Record(item.key, encode_png(image), "png", height, width, mode, item.label)
