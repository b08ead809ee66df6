"""Summarise a finished shard set for orchestrators: counts, a table of shards and two pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from r2id.data.plots import draw_samples, draw_sizes
from r2id.data.shards import ShardSet


@dataclass(frozen=True)
class Overview:
    """The summary of a finished set that an orchestrator shows."""

    summary: str
    table: list[dict[str, Any]]
    """A row per shard."""
    samples: Image.Image
    sizes: Image.Image


def check_split(out: Path, split: str) -> None:
    """Raise InputError when the set in ``out`` has no such split, or nothing in it."""
    ShardSet.open(out).split(split)


def class_names(out: Path) -> list[str]:
    """Return the names of the classes of the set in ``out``."""
    return ShardSet.open(out).class_names


def overview(out: Path, rejects: dict[str, int]) -> Overview:
    """Summarise the set in ``out``; ``rejects`` maps a shard file to its number of rejects."""
    shards = ShardSet.open(out)
    entries = [entry for split in shards.manifest.splits.values() for entry in split.shards]
    table = [
        {
            "shard": entry.file,
            "images": entry.samples,
            "MB": round(entry.bytes / 1e6, 2),
            "rejected": rejects.get(entry.file, 0),
        }
        for entry in entries
    ]
    splits = [shards.split(name) for name, entry in shards.manifest.splits.items() if entry.samples]
    heights, widths = (
        np.concatenate([getattr(split, side) for split in splits]) for side in ("height", "width")
    )
    return Overview(
        f"{out}: {', '.join(f'{len(split)} {split.name}' for split in splits)} images",
        table,
        draw_samples(shards),
        draw_sizes(heights, widths),
    )
