"""Whether what is asked for fits into memory, told before anything is computed.

Nothing is computed to find out: models run on tensors without data (r2id.models.tracing). What a decoder takes for a
large picture is what it takes for two small ones, continued: it decodes some points at a time.

Shape letters: C colours · H, W image · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch

from r2id.errors import InputError
from r2id.images import tile, to_bytes
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import trace_peak

if TYPE_CHECKING:
    from r2id.sampling.sampler import Sampler

_SURELY = 1 << 28
"""Bytes that are never too many, so that nobody waits for the answer."""
_SMALL, _LARGER = (256, 256), (384, 384)


def check_samples(sampler: Sampler, size: Size, grid: Size | None, count: int) -> None:
    """InputError when ``count`` samples of a size (H, W), by default on its own latent grid, held together, would take more
    memory than is free."""
    free, grid = free_memory(sampler.codec.device), grid or sampler.grid_for(size)
    if (
        sampler.batch_length((1, 1), grid) == 1
    ):  # smaller ones are computed in batches that fit everywhere
        _check_grid(sampler, grid, free)
    _check_pictures("size", size, sampler.codec, grid, count, free)


def check_reconstruction(codec: Codec, grid: Size, size: Size, window: Window | None) -> None:
    """InputError when a picture of a size (H, W), or the window of it, decoded from a grid would take more than is free."""
    free = free_memory(codec.device)
    if window is None:
        _check_pictures("size", size, codec, grid, 1, free, "; --window decodes a part")
    else:
        _check_pictures(
            "window of", (window[2] - window[0], window[3] - window[1]), codec, grid, 1, free
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device: of a CPU's memory, no more than the process's control group allows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    try:
        allowed, used = (
            int(Path("/sys/fs/cgroup", name).read_text())
            for name in ("memory.max", "memory.current")
        )
    except (OSError, ValueError):  # no limit, or none that is told there
        return free
    return max(0, min(free, allowed - used))


def _check_grid(sampler: Sampler, grid: Size, free: int) -> None:
    need = _denoising(sampler, grid)
    if need <= free:
        return
    low, high = 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _denoising(sampler, _shrunk(grid, middle)) <= free else (low, middle)
        )
    raise _too_large("grid", grid, need, free, _shrunk(grid, low))


def _check_pictures(
    name: str, size: Size, codec: Codec, grid: Size, count: int, free: int, way_out: str = ""
) -> None:
    pixels = size[0] * size[1]
    if 4 * codec.channels * pixels * count <= _SURELY:
        return
    fixed, per_pixel = _decoding(codec, grid)
    per_pixel += count * _held(codec.channels)
    need = int(fixed + per_pixel * pixels)
    if need > free:
        fits = _shrunk(size, (max(0.0, free - fixed) / (per_pixel * pixels)) ** 0.5)
        raise _too_large(name, size, need, free, fits, way_out)


def _too_large(
    name: str, size: Size, need: int, free: int, fits: Size, way_out: str = ""
) -> InputError:
    return InputError(
        f"{name} {size[0]}x{size[1]}: takes about {need / 1e9:.3g} GB of memory, and {free / 1e9:.3g} GB are "
        f"free; the largest of this shape that fits is {fits[0]}x{fits[1]}{way_out}"
    )


def _shrunk(size: Size, factor: float) -> Size:
    return max(1, int(size[0] * factor)), max(1, int(size[1] * factor))


def _denoising(sampler: Sampler, grid: Size) -> int:
    """Bytes of one evaluation of the model with guidance on a grid (h, w)."""
    model, channels, batch = (
        sampler.model,
        sampler.codec.latent_channels,
        sampler.batch_length((1, 1), grid),
    )

    def work() -> Callable[[], Any]:
        shape = model.condition_shape
        fresh = R2ID(model.config, channels, model.classes, shape).eval().requires_grad_(False)
        condition = torch.zeros(2, batch, *shape) if shape else torch.full((2, batch), -1)
        return partial(
            fresh.predict, torch.zeros(batch, channels, *grid), torch.zeros(batch), condition
        )

    return _traced(sampler.codec, work)


def _decoding(codec: Codec, grid: Size) -> tuple[float, float]:
    """Bytes of decoding a picture from a grid: those that do not depend on its size, and those per pixel."""

    def needed(size: Size) -> int:
        def work() -> Callable[[], Any]:
            model, latents = codec.model, torch.zeros(1, codec.latent_channels, *grid)
            if not isinstance(model, RIAE):
                return lambda: model.decode(latents, size).clamp(-1, 1)
            fresh = RIAE(model.config, model.channels).eval().requires_grad_(False)
            height, width = (
                max(side, math.ceil(codec.downsample * cells))
                for side, cells in zip(size, grid, strict=True)
            )
            return lambda: fresh.decode(latents, (height, width), (0, 0, *size)).clamp(
                -1, 1
            )  # one point a pixel

        return _traced(codec, work)

    (small, less), (large, more) = ((size[0] * size[1], needed(size)) for size in (_SMALL, _LARGER))
    per_pixel = max(0.0, (more - less) / (large - small))
    return max(0.0, less - per_pixel * small), per_pixel


def _held(channels: int) -> float:
    """Bytes per pixel of many images that become one picture."""

    def work() -> Callable[[], Any]:
        images = torch.zeros(1, channels, *_SMALL)
        return lambda: to_bytes(tile(torch.cat([images, images[:0]]), 1))

    return 4 * channels + trace_peak(work) / (_SMALL[0] * _SMALL[1])


def _traced(codec: Codec, work: Callable[[], Callable[[], Any]]) -> int:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=codec.bfloat16):
        return trace_peak(work, as_on_gpu=codec.device.type == "cuda")
