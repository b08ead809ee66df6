"""The loss of spectra: how unlike the power of two pictures is, by spatial frequency.

Durall et al. 2020, "Watch your Up-Convolution: CNN Based Generative Deep Neural Networks are
Failing to Reproduce Spectral Distributions", arXiv:2003.01826, compare radial spectra as here, but
by cross-entropy. It does not punish details at other places than the original's, but too little or
too much detail.
"""

from __future__ import annotations

import torch
from torch import Tensor

from r2id.spectra import radial_spectrum

_ROUNDING = (2 / 255) ** 2 / 12  # variance of what rounding to 8 bits adds to a colour in [−1, 1]


def spectrum_loss(decoded: Tensor, truth: Tensor) -> Tensor:
    """Mean Itakura–Saito divergence of radial spectra of pictures [B, C, H, W] in [−1, 1].

    It is p/q − ln(p/q) − 1 of a true power p and a decoded one q, so that each frequency counts
    alike, and about half the squared log ratio where that is small. Where p cannot be known, the
    best q is its mean. Power of less than what rounding to 8 bits adds hardly counts. The loss is 0
    where a side has fewer than 3 pixels.
    """
    # In float32, because powers of fine details are small beside those of coarse ones.
    with torch.autocast(decoded.device.type, enabled=False):
        ours, theirs = (radial_spectrum(pictures.float()) for pictures in (decoded, truth))
        # The mean square of a Hann window is 3/8 along each side.
        least = _ROUNDING * (3 / 8) ** 2 * truth.shape[2] * truth.shape[3]
        ratio = (theirs + least) / (ours + least)
        return (ratio - ratio.log() - 1).sum() / max(1, ratio.numel())
