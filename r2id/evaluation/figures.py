"""Draw the figures of the evaluation report, each as the bytes of a PNG.

Shape letters: N images · C channels · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from r2id.images import encode_png, tile, to_bytes

_GRID_SIDE = 960  # pixels: about the longer side of a grid
_CELL = 0.95  # inches: about the width of a table's column
_COLOURS = ("#0b5fa5", "#8a8a8a", "#c4511d")


def grid(images: Tensor, columns: int) -> bytes:
    """Draw images [N, C, H, W] in [−1, 1] row by row, each pixel enlarged by a whole factor."""
    tiled = tile(images, columns, gap=max(1, images.shape[2] // 14))
    factor = max(1, _GRID_SIDE // max(tiled.shape[1:]))
    tiled = F.interpolate(tiled.unsqueeze(0), scale_factor=factor, mode="nearest")[0]
    return encode_png(tiled, optimize=True)


def table(
    cells: Sequence[Sequence[Tensor]], rows: Sequence[str], columns: Sequence[str] = ()
) -> bytes:
    """Draw a table of images [C, H, W] in [−1, 1] with row and column labels.

    All images are drawn at the same height and at their own aspect ratio, so that one picture at
    many sizes can be compared at a glance.
    """
    ratios = [max(row[k].shape[2] / row[k].shape[1] for row in cells) for k in range(len(cells[0]))]
    figure = Figure((_CELL * sum(ratios) + 1.0, _CELL * len(cells) + 0.3), layout="constrained")
    names, axes = np.split(
        figure.subplots(len(cells), 1 + len(ratios), squeeze=False, width_ratios=[0.8, *ratios]),
        [1],
        1,
    )
    for row, text, name, panels in zip(cells, rows, names[:, 0], axes, strict=True):
        name.set_axis_off()
        name.text(1, 0.5, text, ha="right", va="center", transform=name.transAxes)
        for image, panel in zip(row, panels, strict=True):
            _show(panel, image)
            panel.spines[:].set_visible(False)
    for panel, text in zip(axes[0], columns, strict=False):
        panel.set_title(text, fontsize=10)
    return _png(figure)


def latents(cells: Sequence[Tensor], most: int = 8) -> bytes:
    """Draw the first ``most`` channels of latents [L, h, w], a row per image; red is above zero."""
    count = min(most, cells[0].shape[0])
    figure = Figure((_CELL * count + 0.8, _CELL * len(cells) + 0.3), layout="constrained")
    axes = figure.subplots(len(cells), count, squeeze=False)
    bound = float(torch.cat([cell[:count].flatten() for cell in cells]).abs().max())
    for cell, panels in zip(cells, axes, strict=True):
        for channel, panel in zip(cell, panels, strict=False):
            shown = panel.imshow(
                channel.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest"
            )
            panel.set(xticks=[], yticks=[])
    for number, panel in enumerate(axes[0]):
        panel.set_title(f"channel {number}", fontsize=10)
    figure.colorbar(shown, ax=axes, shrink=0.6)
    return _png(figure)


def loss_by_time(measured: Mapping[str, Any]) -> bytes:
    """Plot the result of r2id.evaluation.r2id.measure_loss_by_time."""
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, losses), colour in zip(measured["loss"].items(), _COLOURS, strict=False):
        axes.plot(measured["time"], losses, "o-", label=f"given {name}", color=colour, markersize=4)
    axes.set(
        xlabel="time t (0 is data, 1 is noise)",
        ylabel="squared error of the prediction",
        xlim=(0, 1),
    )
    axes.set_ylim(bottom=0)
    _tidy(axes)
    return _png(figure)


def loss_by_grid(measured: Mapping[str, Any]) -> bytes:
    """Plot the result of r2id.evaluation.r2id.measure_loss_by_grid."""
    figure = Figure((6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(measured["grids"].items(), _COLOURS, strict=False):
        axes.plot(
            curve["log_snr"],
            curve["loss"],
            "o-",
            label=f"{name.replace('x', '×')} cells",
            color=colour,
            markersize=4,
        )
    axes.set(
        xlabel="logSNR (data on the right, noise on the left)",
        ylabel="squared error of the prediction",
    )
    _tidy(axes)
    return _png(figure)


def noise_shift(found: Mapping[str, Any]) -> bytes:
    """Plot the result of r2id.evaluation.noise_shift.measure_noise_shift.

    The left plot shows each grid's curve as measured, the right one shifts it by the fitted k, so
    that all curves should coincide with the base grid's.
    """
    figure = Figure((9.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    log_snr = np.array(found["log_snr"])
    for number, (name, curve) in enumerate(found["grids"].items()):
        words = f"{name.replace('x', '×')} cells{'' if curve['trained'] else ', not trained'}"
        for axes, shift in zip(panels, (0.0, curve["shift"]), strict=True):
            axes.plot(
                log_snr + shift,
                curve["error"],
                "o-" if curve["trained"] else "o--",
                label=words,
                color=f"C{number}",
                markersize=3,
            )
    for axes, title in zip(
        panels, ("as measured", f"shifted by 2k·log(n/n_base), k = {found['k']:.3f}"), strict=True
    ):
        axes.set(xlabel="logSNR (data on the right, noise on the left)", title=title)
        _tidy(axes)
    panels[0].set(ylabel="squared error of x₀, its square 1")
    return _png(figure)


def size_curves(names: Sequence[str], lines: Mapping[str, Sequence[float]], words: str) -> bytes:
    """Plot one metric (in ``words``) against the size, a line for each set of images."""
    figure = Figure((7.6, 3.2), layout="constrained")
    axes = figure.subplots()
    for (name, values), colour in zip(lines.items(), _COLOURS, strict=False):
        axes.plot(range(len(values)), values, "o-", label=name, color=colour, markersize=4)
    axes.set_xticks(range(len(names)), [name.replace("x", "×") for name in names], rotation=45)
    axes.set(ylabel=words)
    _tidy(axes)
    return _png(figure)


def guidance(found: Mapping[str, Any], real: Mapping[str, Any]) -> bytes:
    """Plot the result of r2id.evaluation.guidance.sweep_guidance, beside that of real images."""
    figure = Figure((9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows = sorted(found["scales"], key=lambda row: row["guidance"])
    scales = [row["guidance"] for row in rows]
    for axes, names in ((left, ("frechet",)), (right, ("accuracy", "precision", "recall"))):
        for name, colour in zip(names, _COLOURS, strict=False):
            if any(row[name] is None for row in rows):
                continue
            words = "Fréchet distance" if name == "frechet" else name
            axes.plot(scales, [row[name] for row in rows], "o-", label=words, color=colour)
            floor = real.get(f"{name}_of_training_images")
            if floor is not None:
                axes.axhline(floor, color=colour, ls=":", label=f"{words} of real training images")
        axes.set(xlabel="guidance")
        axes.set_ylim(bottom=0)
        _tidy(axes)
    left.axvline(found["least_frechet"], color="#c8c8c8", zorder=0)
    return _png(figure)


def captioned(images: Sequence[Tensor], captions: Sequence[str], columns: int = 10) -> bytes:
    """Draw images [C, H, W] in [−1, 1] of one size row by row, with a caption under each."""
    rows = -(-len(images) // columns)
    ratio = images[0].shape[1] / images[0].shape[2]
    figure = Figure((_CELL * columns + 0.2, (_CELL * ratio + 0.4) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel, image, caption in zip(panels, images, captions, strict=False):
        _show(panel, image)
        panel.set_xlabel(caption, fontsize=8)
    for panel in panels[len(images) :]:
        panel.set_axis_off()
    return _png(figure)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _show(panel: Axes, image: Tensor) -> None:
    """Draw an image [C, H, W] in [−1, 1] without interpolation and ticks."""
    pixels = to_bytes(image).squeeze(-1).numpy()
    panel.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    panel.set(xticks=[], yticks=[])


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
