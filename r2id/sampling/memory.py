"""Memory check: refuse samples that would not fit into memory, before anything is computed.

Peaks are predicted by running the models on tensors without data (r2id.models.tracing). The
decoder's peak is linear in the number of pixels, because it decodes a limited number of points at a
time. So it is traced for two small pictures and extrapolated. Models compute on their device;
finished pictures are held, edited and saved in the CPU's memory.

Shape letters: C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from r2id.errors import InputError
from r2id.images import tile, to_bytes
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window, check_size, part_of
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import trace_peak
from r2id.sampling.editing import put_in
from r2id.sampling.sampler import Sampler

_ALWAYS_FITS = 1 << 28
"""Bytes that are assumed to fit without a check, because tracing takes a second."""
_TRACED: dict[str, tuple[Size, Size]] = {
    "attention": ((256, 256), (384, 384)),
    "lattice": ((800, 800), (1200, 1200)),
}
"""The sizes at which decoding is traced, of each kind of RIAE: larger than what is decoded at
once."""
_SMALL = 256, 256
"""The size of a picture of which a file is made to see what that takes."""
_CPU = torch.device("cpu")
_CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux tells the memory limit of a container."""


def check_samples(sampler: Sampler, size: Size, grid: Size | None, count: int) -> None:
    """Raise InputError when drawing ``count`` samples of a size (H, W) would not fit into memory.

    ``grid`` is their latent grid, by default the one for their size. Also raised for an invalid
    size.
    """
    check_size(size)
    if grid is not None:
        check_size(grid, "grid", "latent cells")
    grid = grid or sampler.grid_for(size)
    # Grids that are so small that several are denoised at a time fit everywhere.
    if sampler.batch_length((1, 1), grid) == 1:
        _check_grid(sampler, grid)
    _check_pictures("size", size, sampler.codec, grid, count)


def check_edit(sampler: Sampler, size: Size, grid: Size) -> None:
    """Raise InputError when editing a picture of a size (H, W) on a grid would not fit."""
    check_samples(sampler, size, grid, 1)
    channels = sampler.codec.channels

    def work() -> Callable[[], Any]:
        image, known = torch.zeros(1, channels, *_SMALL), torch.ones(1, 1, *_SMALL).bool()
        return lambda: put_in(image, known, image + 0)

    pixels = size[0] * size[1]
    if 4 * channels * pixels <= _ALWAYS_FITS // 16:
        return
    per_pixel = _held(channels) + trace_peak(work) / (_SMALL[0] * _SMALL[1])
    _check("size", size, _CPU, 0.0, per_pixel)


def check_reconstruction(
    codec: Codec, grid: Size, size: Size, window: Window | None, count: int = 1
) -> None:
    """Raise InputError when decoding ``count`` grids at a size (H, W) would not fit into memory.

    With ``window`` (y0, x0, y1, x1) only that part is decoded, and only that must fit. Also raised
    for an invalid size or window.
    """
    check_size(size)
    if window is None:
        _check_pictures("size", size, codec, grid, count, "; --window decodes a part")
    else:
        rows, columns = part_of(size, window)
        window_size = rows.stop - rows.start, columns.stop - columns.start
        _check_pictures("window of", window_size, codec, grid, count, picture=size)


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device; for a CPU, at most what the process's container allows."""
    if device.type == "cuda":
        # What torch holds and does not use is free for its next tensors.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    free = int(psutil.virtual_memory().available)
    try:
        allowed, used, parts = (
            (_CONTROL_GROUP / name).read_text(encoding="utf-8")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        # Files that were read stay in memory until something else needs it.
        cached = int(dict(line.split() for line in parts.splitlines())["inactive_file"])
        left = int(allowed) - int(used) + cached
    except (OSError, ValueError):  # there is no such file, or it says "max": no limit
        return free
    return max(0, min(free, left))


def _check_grid(sampler: Sampler, grid: Size) -> None:
    """Raise InputError when denoising a grid would not fit."""
    device = sampler.codec.device
    need, free = _denoising(sampler, grid), free_memory(device)
    if need <= free:
        return
    # The peak is no simple function of the grid, so bisect for the largest that fits.
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        fits = _denoising(sampler, _shrunk(grid, middle)) <= free
        low, high = (middle, high) if fits else (low, middle)
    raise _too_large("grid", grid, device, need, free, _shrunk(grid, low))


def _check_pictures(
    name: str,
    size: Size,
    codec: Codec,
    grid: Size,
    count: int,
    way_out: str = "",
    picture: Size | None = None,
) -> None:
    """Raise InputError when decoding and holding ``count`` pictures would not fit.

    The error calls their size ``name``, and ends with ``way_out``. With ``picture``, they are
    windows of pictures of that size.
    """
    pixels = size[0] * size[1]
    if 4 * codec.channels * pixels * count <= _ALWAYS_FITS:
        return
    fixed, per_pixel = _decoding(codec, grid, picture or size)
    # Pictures are decoded one at a time, and all are held.
    held = count * _held(codec.channels)
    if codec.device.type == "cpu":
        _check(name, size, _CPU, fixed, per_pixel + held, way_out)
        return
    _check(name, size, codec.device, fixed, per_pixel, way_out)
    _check(name, size, _CPU, 0.0, held, way_out)


def _check(
    name: str, size: Size, device: torch.device, fixed: float, per_pixel: float, way_out: str = ""
) -> None:
    """Raise InputError when so many bytes, and so many per pixel of a size, are not free there."""
    need, free = int(fixed + per_pixel * size[0] * size[1]), free_memory(device)
    if need > free:
        factor = max(0.0, free - fixed) / (need - fixed or 1.0)
        raise _too_large(name, size, device, need, free, _shrunk(size, factor**0.5), way_out)


def _too_large(
    name: str, size: Size, device: torch.device, need: int, free: int, fits: Size, way_out: str = ""
) -> InputError:
    where = "memory" if device.type == "cpu" else "the GPU's memory"
    return InputError(
        f"{name} {size[0]}x{size[1]}: takes about {need / 1e9:.3g} GB of {where}, and "
        f"{free / 1e9:.3g} GB are free; the largest of this shape that fits is "
        f"{fits[0]}x{fits[1]}{way_out}"
    )


def _shrunk(size: Size, factor: float) -> Size:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _denoising(sampler: Sampler, grid: Size) -> int:
    """Predict the peak bytes of evaluating the model once, with all guidance, on a grid (h, w)."""
    model, channels = sampler.model, sampler.codec.latent_channels
    batch = sampler.batch_length((1, 1), grid)

    def work() -> Callable[[], Any]:
        shape = model.condition_shape
        # Built anew under trace_peak, so that its weights are tensors without data too.
        fresh = R2ID(model.config, channels, model.classes, shape).eval().requires_grad_(False)
        condition = torch.zeros(2, batch, *shape) if shape else torch.full((2, batch), -1)
        noised, times = torch.zeros(batch, channels, *grid), torch.zeros(batch)
        return partial(fresh.predict, noised, times, condition)

    return _traced(sampler.codec, work)


def _decoding(codec: Codec, grid: Size, picture: Size) -> tuple[float, float]:
    """Predict the peak bytes of decoding a grid as a picture of a size, or windows of it.

    Returns bytes for windows of any size, and bytes per pixel of them.
    """
    model = codec.model
    kind = model.config.kind if isinstance(model, RIAE) else "attention"

    def needed(size: Size) -> int:
        def work() -> Callable[[], Any]:
            latents = torch.zeros(1, codec.latent_channels, *grid)
            if not isinstance(model, RIAE):
                return lambda: model.decode(latents, size).clamp(-1, 1)
            fresh = RIAE(model.config, model.channels).eval().requires_grad_(False)
            # Decode a window of a picture that is at least as large as the grid's own. There a
            # pixel takes one point, as in large pictures; in smaller ones it would take several.
            height, width = (
                max(side, whole, math.ceil(codec.downsample * cells))
                for side, whole, cells in zip(size, picture, grid, strict=True)
            )
            return lambda: fresh.decode(latents, (height, width), (0, 0, *size)).clamp(-1, 1)

        return _traced(codec, work)

    (small, less), (large, more) = ((size[0] * size[1], needed(size)) for size in _TRACED[kind])
    per_pixel = max(0.0, (more - less) / (large - small))
    return max(0.0, less - per_pixel * small), per_pixel


def _held(channels: int) -> float:
    """Predict the bytes per pixel of holding a picture and making a PNG file of it."""

    def work() -> Callable[[], Any]:
        images = torch.zeros(1, channels, *_SMALL)
        return lambda: to_bytes(tile(torch.cat([images, images[:0]]), 1))

    return 4 * channels + trace_peak(work) / (_SMALL[0] * _SMALL[1])


def _traced(codec: Codec, work: Callable[[], Callable[[], Any]]) -> int:
    """Predict the peak bytes of what ``work`` makes, on the codec's device and in its precision."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=codec.bfloat16):
        return trace_peak(work, as_on_gpu=codec.device.type == "cuda")
