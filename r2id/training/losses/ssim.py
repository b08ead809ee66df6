"""The loss of structure: how unlike two pictures are in the eyes of SSIM.

Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.models.coords import Size

_SIGMA = 1.5  # of the window in pixels, as published
_REACH = 3.5  # how many sigmas torchmetrics' window reaches to each side


def ssim_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """1 − SSIM of pictures [B, C, H, W] in [−1, 1], averaged: 0 for equal ones, at most 2.

    Under a Gaussian window of 11×11 pixels. Where a side has fewer than 6, the window shrinks with
    it, because beyond the border pictures are mirrored, which takes as many pixels.
    """
    # Imported here, because it takes a second and most runs do without.
    from torchmetrics.functional.image import structural_similarity_index_measure

    # In float32, because variances are differences of nearly equal squares. From 0 up, because SSIM
    # compares brightnesses by their ratio.
    with torch.autocast(decoded.device.type, enabled=False):
        similarity = structural_similarity_index_measure(
            decoded.float() + 1,
            truth.float() + 1,
            sigma=_sigmas((truth.shape[2], truth.shape[3])),
            data_range=2.0,
        )
    assert isinstance(similarity, Tensor)
    return 1 - similarity


def _sigmas(size: Size) -> list[float]:
    """Choose the window's sigmas along both axes, so that its reach is less than each side."""
    return [min(_SIGMA, max(side - 1, 0.25) / _REACH) for side in size]
