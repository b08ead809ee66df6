"""Draw a shard set: a grid of some of its samples, and a histogram of all image sizes."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from PIL import Image

from r2id.data.records import decode
from r2id.data.shards import ShardSet, Split

_THUMB, _GAP, _COLUMNS = 96, 4, 12  # side and gap in pixels, thumbnails in a row


def draw_samples(shards: ShardSet, count: int = 48) -> Image.Image:
    """Draw a grid of ``count`` samples of the largest split, evenly spaced over its classes."""
    splits = sorted(
        (shards.split(name) for name, entry in shards.manifest.splits.items() if entry.samples),
        key=len,
    )
    samples = splits[-1]
    chosen = _spread(samples, count)
    columns, side = min(_COLUMNS, len(chosen)), _THUMB + _GAP
    rows = -(-len(chosen) // columns)
    grid = Image.new("RGB", (columns * side + _GAP, rows * side + _GAP), "white")
    for place, index in enumerate(chosen):
        picture = Image.fromarray(decode(samples.read(int(index)), 3))
        scale = _THUMB / max(picture.size)
        size = [max(1, round(length * scale)) for length in picture.size]
        picture = picture.resize(
            (size[0], size[1]), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        )
        left, top = _GAP + place % columns * side, _GAP + place // columns * side
        grid.paste(picture, (left + (_THUMB - size[0]) // 2, top + (_THUMB - size[1]) // 2))
    return grid


def draw_sizes(heights: np.ndarray, widths: np.ndarray) -> Image.Image:
    """Plot histograms of sizes and aspect ratios of images with heights [N] and widths [N]."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    sizes, ratios = figure.subplots(1, 2)
    bins = [_edges(widths), _edges(heights)]
    drawn = sizes.hist2d(widths, heights, bins=bins, norm=LogNorm(), cmap="viridis", cmin=1)
    figure.colorbar(drawn[3], ax=sizes, label="images")
    sizes.set(
        xlabel="width (pixels)",
        ylabel="height (pixels)",
        title=f"{len(heights)} images",
        aspect="equal",
    )
    ratios.hist(np.log2(widths / heights), bins=60, log=True, color="tab:green")
    ticks = np.arange(
        np.floor(np.log2((widths / heights).min())), np.ceil(np.log2((widths / heights).max())) + 1
    )
    ratios.set(
        xlabel="width / height",
        ylabel="images",
        title="aspect ratios",
        xticks=ticks,
        xticklabels=[f"1:{2**-tick:g}" if tick < 0 else f"{2**tick:g}:1" for tick in ticks],
    )
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return Image.open(buffer)


def _spread(samples: Split, count: int) -> np.ndarray:
    """Return the indices of samples at even distances, in the order of classes, then of shards."""
    order = np.argsort(samples.label, kind="stable")
    count = min(count, len(order))
    return order[np.arange(count) * len(order) // count]


def _edges(sides: np.ndarray) -> np.ndarray:
    """Return the edges of at most 80 bins, centred on whole pixels."""
    low, high = int(sides.min()) - 2, int(sides.max()) + 3
    return np.arange(low, high + 1, max(1, -(-(high - low) // 80))) - 0.5
