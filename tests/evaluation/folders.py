"""Write shard sets of random images."""

from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.prepare import prepare
from r2id.config import PrepareConfig


def write_folder(
    place: Path, counts: dict[str, int], sizes: tuple[tuple[int, int], ...] = ((8, 8),)
) -> Path:
    """Shard random grey images: ``counts`` of them per subfolder, taking ``sizes`` in turn."""
    generator = np.random.default_rng(0)
    for name, count in counts.items():
        (place / "source" / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, sizes[number % len(sizes)], dtype=np.uint8)
            Image.fromarray(pixels).save(place / "source" / name / f"{number}.png")
    return prepare(PrepareConfig(dataset="folder", source=place / "source", out=place / "shards"))
