"""Measure the noise shift between latent grids: the exponent k that makes error curves coincide.

A larger image needs more noise to hide the same content, because neighbouring pixels are alike:
logSNR_n(t) = logSNR_base(t) − 2·k·log(n/n_base), n = √(h·w) (Hoogeboom et al. 2023, "Simple
diffusion"). k is 1 for pixels, if a larger grid only repeats what a smaller one shows, and 0 for
latents in which every cell holds new information. This module measures where between these a codec
lies.

The same test images are encoded on several grids, and the network denoises all of them at the same
logSNRs. For every training objective, the error is that of x₀ divided by the mean square of x₀. It
rises from 0 to 1 with the noise, so the curves of different grids are comparable even if the
latents of one grid are larger than those of another.

On grids that the network was not trained on, its error also counts; the result tells which these
are.

Shape letters: L latent channels · h, w latent grid · P logSNRs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.trained import read_section
from r2id.config import DataConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.evaluation import figures
from r2id.evaluation.errors_by_noise import data_error
from r2id.evaluation.provenance import evaluated_data
from r2id.evaluation.r2id import Latents, encode_resized
from r2id.files import NOISE_SHIFT_FILE, write_atomic, write_json
from r2id.models.coords import Size, scale_size
from r2id.progress import Progress
from r2id.sampling import noise_shift
from r2id.sampling.sampler import Sampler

FORMAT_VERSION = 1
LOG_SNRS = tuple(0.5 * step for step in range(-12, 13))
FACTORS = (0.75, 1.0, 1.25, 1.5)
"""Sides of the encoded images relative to the training images. The smallest and the largest trained
grid are measured too."""

_FARTHEST, _FINENESS = 4.0, 0.01  # displacements tried, in logSNR: the largest, and their spacing

Curves = Mapping[Size, Sequence[float]]


@dataclass(frozen=True)
class Fit:
    """The fitted exponent, and how well each grid's curve agrees with the base grid's."""

    k: float
    displacements: dict[Size, float]
    """The logSNR by which each curve, moved towards noise, fits the base grid's best."""
    mismatches: dict[Size, float]
    """RMS difference of the two curves at that displacement."""
    residual: float
    """RMS over grids of displacement − 2·k·log(n/n_base)."""

    def shift(self, grid: Size, base: Size) -> float:
        """Return the displacement in logSNR that the fitted k gives for a grid."""
        return self.k * _log_ratio(grid, base)


def measure_noise_shift(
    source: Checkpoint | Path,
    shards: Path,
    out: Path | None = None,
    *,
    images: int = 256,
    seed: int = 0,
    split: str | None = None,
    apply: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Measure k of an R2ID checkpoint on some test images of a shard set.

    Writes noise-shift.json and noise-shift.png into ``out`` (by default ``report`` in the run
    directory) and returns the content of the JSON file. The images are of ``split``, by default of
    ``data.test_split`` of the training. With ``apply``, sampling from this
    checkpoint uses the measured k from now on; see r2id.sampling.noise_shift.

    Raises InputError when checkpoint, shards or ``out`` are unusable, and WorkError when a curve
    does not fit the base grid's at any displacement.
    """
    checkpoint = Checkpoint.open(source)
    out = out or noise_shift.applied_file(checkpoint).parent / "report"
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; must be a folder")
    if apply and out.resolve() == noise_shift.applied_file(checkpoint).parent.resolve():
        raise InputError(
            f"--out {out}: is the run directory, where --apply writes; choose another folder"
        )
    opened, sampler = ShardSet.open(shards), Sampler.load(checkpoint, device)
    recorded = read_section(checkpoint, "data", DataConfig)
    data = evaluated_data(recorded, opened, split)
    sizes = choose_sizes(sampler)
    curves: dict[Size, list[float]] = {}
    with Progress("noise-shift", len(sizes) * len(LOG_SNRS), unit="logSNRs") as progress:
        for grid, size in sizes.items():
            latents = encode_resized(sampler, opened, data, size, images)
            curves[grid] = measure_curve(sampler, latents, seed, progress)
    base = sampler.codec.grid_for(sampler.codec.image)
    fit = fit_exponent(curves, base)
    result = {
        **_describe(sampler, fit, curves, base, sizes),
        "images": sum(len(label) for _, label in latents),
        "seed": seed,
        "split": data.test_split,
        "data": opened.digest,
        "checkpoint": checkpoint.identity,
    }
    write_json(out / NOISE_SHIFT_FILE, result)
    write_atomic(out / "noise-shift.png", figures.noise_shift(result))
    if apply:
        noise_shift.apply(checkpoint, result)
    return result


def choose_sizes(sampler: Sampler) -> dict[Size, Size]:
    """Return the latent grids to measure, each with the image size that is encoded onto it.

    Raises InputError when all image sizes give the same grid.
    """
    own = sampler.codec.image
    base = math.prod(sampler.codec.grid_for(own))
    sizes: dict[Size, Size] = {}
    for factor in (*FACTORS, *((area / base) ** 0.5 for area in sampler.areas)):
        size = scale_size(own, (factor, factor))
        sizes.setdefault(sampler.codec.grid_for(size), size)
    if len({math.prod(grid) for grid in sizes}) < 2:
        raise InputError(
            f"{sampler.codec.name}: has one latent grid, {next(iter(sizes))}, for all sizes "
            f"around {own}; a shift takes two"
        )
    return dict(sorted(sizes.items(), key=lambda item: math.prod(item[0])))


def measure_curve(
    sampler: Sampler, latents: Latents, seed: int = 0, progress: Progress | None = None
) -> list[float]:
    """Return the squared error of x₀ over its mean square at each of LOG_SNRS.

    A model that is conditioned on classes is given the true class.
    """
    errors = []
    power = sum(
        float(sampler.codec.normalise(latent).square().flatten(1).mean(1).sum())
        for latent, _ in latents
    )
    for log_snr in LOG_SNRS:
        total = 0.0
        for number, (latent, label) in enumerate(latents):
            condition = label if sampler.num_classes > 1 else torch.full_like(label, -1)
            total += float(data_error(sampler, latent, condition, log_snr, seed + number).sum())
        errors.append(total / power)
        if progress:
            progress.advance()
    return errors


def fit_exponent(curves: Curves, base: Size) -> Fit:
    """Fit k by least squares through the origin: displacement against 2·log(n/n_base).

    Raises WorkError when a curve does not fit the base grid's at any displacement.
    """
    displacements, mismatches = {}, {}
    for grid, curve in curves.items():
        displacements[grid], mismatches[grid] = find_displacement(curves[base], curve)
        if abs(displacements[grid]) > _FARTHEST - _FINENESS:
            raise WorkError(
                f"grid {grid[0]}x{grid[1]}: its curve of error against logSNR is not the base "
                f"grid's at any displacement up to {_FARTHEST}; the model has not learnt to "
                "denoise it"
            )
    ratios = np.array([_log_ratio(grid, base) for grid in curves])
    moved = np.array(list(displacements.values()))
    k = float(ratios @ moved / (ratios @ ratios))
    residual = float(np.sqrt(np.mean((moved - k * ratios) ** 2)))
    return Fit(k, displacements, mismatches, residual)


def find_displacement(base: Sequence[float], curve: Sequence[float]) -> tuple[float, float]:
    """Find the d at which curve(logSNR − d) is closest to base(logSNR); return (d, RMS difference).

    The difference is taken over the overlap of the two. Between the measured points both curves are
    interpolated by monotone cubics (Fritsch & Carlson 1980), which do not overshoot.
    """
    fixed, moving = PchipInterpolator(LOG_SNRS, base), PchipInterpolator(LOG_SNRS, curve)
    displacements = np.arange(-_FARTHEST, _FARTHEST + _FINENESS / 2, _FINENESS)
    mismatches = [mismatch(fixed, moving, d) for d in displacements]
    best = int(np.argmin(mismatches))
    return float(displacements[best]), mismatches[best]


def mismatch(base: PchipInterpolator, curve: PchipInterpolator, d: float) -> float:
    """Return the RMS difference of base(logSNR) and curve(logSNR − d) over their overlap."""
    first, last = LOG_SNRS[0] + max(d, 0.0), LOG_SNRS[-1] + min(d, 0.0)
    points = np.linspace(first, last, 1 + round((last - first) / 0.1))
    return float(np.sqrt(np.mean((base(points) - curve(points - d)) ** 2)))


def _log_ratio(grid: Size, base: Size) -> float:
    """Return 2·log(n/n_base), n = √(h·w)."""
    return math.log(math.prod(grid) / math.prod(base))


def _describe(
    sampler: Sampler, fit: Fit, curves: Curves, base: Size, sizes: Mapping[Size, Size]
) -> dict[str, Any]:
    """Build the part of noise-shift.json that describes the measurement."""
    low, high = sampler.areas
    smooth = {grid: PchipInterpolator(LOG_SNRS, curve) for grid, curve in curves.items()}
    return {
        "format_version": FORMAT_VERSION,
        "k": fit.k,
        "residual": fit.residual,
        "used_before": sampler.diffusion.shift_exponent,
        "error": "squared error of x0 over the mean square of x0",
        "base": f"{base[0]}x{base[1]}",
        "log_snr": list(LOG_SNRS),
        "grids": {
            f"{grid[0]}x{grid[1]}": {
                "size": list(sizes[grid]),
                "trained": low <= math.prod(grid) <= high,
                "error": list(curve),
                "displacement": fit.displacements[grid],
                "shift": fit.shift(grid, base),
                "mismatch_unshifted": mismatch(smooth[base], smooth[grid], 0.0),
                "mismatch_shifted": mismatch(smooth[base], smooth[grid], fit.shift(grid, base)),
                "mismatch_best": fit.mismatches[grid],
            }
            for grid, curve in curves.items()
        },
    }
