"""Samples as a shard set, which training and evaluation read like any other.

Shape letters: C colours · H, W image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from r2id.data.index import find_intact, read_commit
from r2id.data.manifest import FORMAT_VERSION, Manifest, SplitEntry, shard_file
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.errors import WorkError
from r2id.images import encode_png
from r2id.models.coords import Size

_SPLIT = "samples"
# Upper limits of a shard, which always holds whole batches. Shards are small, because a process
# that is killed draws its shard again.
_SAMPLES, _PIXELS = 512, 1 << 23


class ShardFiles:
    """Writes samples into shards, each of which is complete or absent."""

    def __init__(
        self, out: Path, facts: dict[str, Any], labels: Sequence[int], class_names: Sequence[str]
    ) -> None:
        """``facts`` are those of sampling.json; ``labels`` are −1 for samples without a class."""
        self.out, self.facts, self.labels, self.class_names = out, facts, labels, class_names
        self.length = shard_length(facts["size"], facts["batch"])

    def is_done(self, part: range) -> bool:
        """Tell whether the shard of a part is committed and intact."""
        return find_intact(self.out, self._file(part)) is not None

    def write(self, part: range, samples: Iterator[tuple[int, Tensor]]) -> None:
        """Write samples, (number, image [C, H, W] in [−1, 1]) each, into the shard of a part."""
        records = (self._record(number, image) for number, image in samples)
        write_shard_files(self.out, self._file(part), records, [])

    def finish(self, parts: Sequence[range]) -> str:
        """Write the set's manifest → its checksum. Raises WorkError when a shard is missing."""
        try:
            entries = [read_commit(self.out, self._file(part))[0] for part in parts]
        except (OSError, ValueError) as error:
            raise WorkError(f"{self.out}: not written: {error}") from None
        source = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        size = sum(entry.bytes for entry in entries)
        split = SplitEntry(samples=self.facts["count"], bytes=size, shards=entries)
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            dataset="samples",
            source_digest=source,
            rejects=0,
            class_names=list(self.class_names),
            splits={_SPLIT: split},
        )
        return manifest.write(self.out).checksum

    def _file(self, part: range) -> str:
        return shard_file(_SPLIT, part.start // self.length)

    def _record(self, number: int, image: Tensor) -> Record:
        label = self.labels[number]
        return Record(
            key=f"{number:08d}",
            image=encode_png(image),
            ext="png",
            height=image.shape[1],
            width=image.shape[2],
            mode="L" if image.shape[0] == 1 else "RGB",
            label=None if label < 0 else label,
            meta={"seed": self.facts["first_seed"] + number},
        )


def shard_length(size: Size, batch: int) -> int:
    """Return the number of samples of a size in a shard: a power of two, and at least a batch."""
    most = max(1, min(_SAMPLES, _PIXELS // (size[0] * size[1])))
    return max(batch, 1 << most.bit_length() - 1)
