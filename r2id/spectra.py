"""Radial power spectra: how much power images have at each spatial frequency.

Shape letters: N images · C colours · H, W picture · R rings of frequencies.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from r2id.constants import cached_tensors

_RINGS_PER_OCTAVE = 2


def radial_spectrum(images: Tensor) -> Tensor:
    """Return the power of each image [N, C, H, W] by spatial frequency, its colours' mean: [N, R].

    Rings of frequencies are half an octave wide, from one cycle per shorter side to half a cycle
    per pixel. Each image, less its mean colour, is under a Hann window, so that its border does not
    leak into high frequencies. R is 0 where a side is shorter than 3 pixels. The images are to be
    float32 or float64, which the power then has too; it has a gradient.
    """
    x = images - images.mean((2, 3), keepdim=True)
    window, rings = _window_and_rings(x.shape[2], x.shape[3], x.dtype, x.device)
    power = torch.fft.fft2(x * window).abs().square().mean(1)
    return power.flatten(1) @ rings.flatten(1).T


@cached_tensors(8)
def _window_and_rings(
    height: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Make the window [H, W] and the rings [R, H, W], each 1 over its frequencies' number there."""
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    shorter = min(height, width)
    octaves = math.log2(max(shorter, 3) / 2)
    count = round(octaves * _RINGS_PER_OCTAVE) if shorter > 2 else 0
    # A frequency on the border of two rings must not move with rounding.
    ring = np.floor(np.log2(radius * shorter + 1e-4) / octaves * count)
    ring[radius >= 0.5 - 1e-6] = count  # the corners, and what has no finer neighbour
    masks = [ring == number for number in range(count) if (ring == number).any()]
    rings = np.reshape([mask / mask.sum() for mask in masks], (len(masks), height, width))
    return (
        torch.tensor(window, dtype=dtype).to(device, non_blocking=True),
        torch.tensor(rings, dtype=dtype).to(device, non_blocking=True),
    )
