"""Compute statistics of a shard set: sizes, classes, and the buckets that training would use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from r2id.config import DataConfig
from r2id.data.epoch_plan import Buckets
from r2id.data.loader import split_buckets
from r2id.data.shards import ShardSet, Split
from r2id.progress import counted

_NAMED, _MOST = 8, 24  # rare sizes that are named, and buckets that are listed


def split_stats(shards: ShardSet, data: DataConfig, name: str, batch: int) -> dict[str, Any]:
    """Return statistics of one split for these data settings.

    "height" and "width" are those of the upright images, "ratio" is width / height, "bytes" counts
    the stored images. "lost" is the mean share of an image's area that is cut off.
    """
    samples = shards.split(name)
    buckets = split_buckets(samples, data)
    lost = crop_loss(samples, buckets)
    return {
        "samples": len(samples),
        "shards": len(samples.entries),
        "bytes": int(samples.size.sum()),
        "height": _spread(samples.height),
        "width": _spread(samples.width),
        "ratio": _spread(samples.width / samples.height),
        "classes": _classes(samples, shards.class_names),
        "buckets": _buckets(buckets, lost, batch, data.batch_pixels),
        "lost": float(lost.mean()),
        "steps": buckets.batches(batch, data.batch_pixels),
        "repeats": buckets.repeats(batch, data.batch_pixels),
    }


def crop_loss(samples: Split, buckets: Buckets) -> np.ndarray:
    """Return the share [N] of each image's area that is cut off to fit its bucket's aspect ratio.

    Shrinking cuts nothing off.
    """
    heights, widths = samples.height.astype(np.float64), samples.width.astype(np.float64)
    scale = np.maximum(buckets.height / heights, buckets.width / widths)
    return 1 - (buckets.height / scale) * (buckets.width / scale) / (heights * widths)


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return {"min": float(low), "median": float(middle), "max": float(high)}


def _classes(samples: Split, names: Sequence[str]) -> dict[str, Any]:
    """Count classes, and the samples of the rarest, a median and the most frequent class."""
    counts = np.bincount(samples.label[samples.label >= 0], minlength=len(names))
    stats: dict[str, Any] = {"count": len(names), "unlabelled": int((samples.label < 0).sum())}
    if len(counts):
        stats |= {
            "samples": _spread(counts),
            "rarest": names[int(counts.argmin())],
            "largest": names[int(counts.argmax())],
        }
    return stats


def _buckets(
    buckets: Buckets, lost: np.ndarray, batch: int, batch_pixels: int | None
) -> list[dict[str, Any]]:
    """Return one row per bucket, from the most frequent size to the rarest.

    "repeats" counts the images that an epoch shows again to fill the last step, "times" says how
    often it shows one of them at most.
    """
    sizes = buckets.batch_sizes(batch, batch_pixels)
    rows = [
        {
            "height": height,
            "width": width,
            "samples": len(members),
            "lost": float(lost[members].mean()),
            "batch": size,
            "repeats": -len(members) % size,
            "times": 1 + math.ceil((-len(members) % size) / len(members)),
        }
        for (height, width), members, size in zip(
            buckets.sizes, buckets.members, sizes, strict=True
        )
    ]
    return sorted(rows, key=lambda row: -row["samples"])


def describe_stats(name: str, stats: dict[str, Any]) -> list[str]:
    """Format the statistics of one split as lines of text, with at most _MOST buckets."""
    classes, buckets = stats["classes"], stats["buckets"]
    lines = [
        f"{name}: {counted(stats['samples'], 'image')} in {counted(stats['shards'], 'shard')}, "
        f"{stats['bytes'] / 1e6:.1f} MB"
    ]
    lines += [
        f"  {key:<8}{_words(stats[key], '.2f' if key == 'ratio' else '.0f')}"
        for key in ("height", "width", "ratio")
    ]
    if classes["count"]:
        even = classes["samples"]["min"] == classes["samples"]["max"]
        words = "" if even else f" (rarest {classes['rarest']!r}, largest {classes['largest']!r})"
        lines.append(
            f"  classes {classes['count']}, of {_words(classes['samples'], '.0f')} images{words}, "
            f"{classes['unlabelled']} images without"
        )
    most_times = max(row["times"] for row in buckets)
    again = f", one up to {most_times} times" if most_times > 2 else ""
    lines.append(
        f"  epoch   {counted(stats['steps'], 'step')} in {counted(len(buckets), 'bucket')}, "
        f"{counted(stats['repeats'], 'image')} again to fill the last steps{again}; "
        f"{stats['lost']:.1%} of the area cut off"
    )
    small = [row for row in buckets if 2 * row["samples"] < row["batch"]]
    if small:
        named = ", ".join(
            f"{_size(row)} ({counted(row['samples'], 'image')} up to {row['times']} times)"
            for row in small[:_NAMED]
        )
        more = f" and {len(small) - _NAMED} more" if len(small) > _NAMED else ""
        lines.append(f"  rare    less than half a step: {named}{more}")
    lines.append(
        f"    {'bucket':>11} {'images':>9} {'share':>7} {'cut off':>8} {'batch':>6} {'again':>6}"
    )
    for row in buckets[:_MOST]:
        lines.append(
            f"    {_size(row):>11} {row['samples']:>9} {row['samples'] / stats['samples']:>7.1%} "
            f"{row['lost']:>8.1%} {row['batch']:>6} {row['repeats']:>6}"
        )
    if len(buckets) > _MOST:
        rest = sum(row["samples"] for row in buckets[_MOST:])
        lines.append(f"    {counted(len(buckets) - _MOST, 'more bucket')} with {rest} images")
    return lines


def _size(row: dict[str, Any]) -> str:
    return f"{row['height']}x{row['width']}"


def _words(spread: dict[str, float], form: str) -> str:
    if spread["min"] == spread["max"]:
        return f"{spread['min']:{form}}"
    ends = f"{spread['min']:{form}} to {spread['max']:{form}}"
    return f"{ends}, half of them up to {spread['median']:{form}}"
