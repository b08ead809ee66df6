"""Moving average of weights, with a warm-up of its decay."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def decay_at(step: int, limit: float) -> float:
    """Decay of the update after step ``step`` (from 0): min(limit, (1 + step) / (10 + step)), as in the exponential
    moving average of TensorFlow's ``num_updates``: early weights, which are noise, are soon forgotten."""
    return min(limit, (1 + step) / (10 + step))


class Ema:
    """Averages of float tensors, kept beside them on the same device.

    Which tensors is up to the caller: a model's parameters, or, where an optimizer's state is spread over ranks, this
    rank's share of them, since averaging is elementwise and needs no communication. A model's buffers are state and
    not weights: who exports an average takes them from the model as they are.
    """

    def __init__(self, sources: Sequence[Tensor], limit: float) -> None:
        self.sources = [source.detach() for source in sources]
        self.limit = limit
        self.averages = [source.clone() for source in self.sources]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average ← decay·average + (1 − decay)·source, after optimizer step ``step`` (from 0)."""
        torch._foreach_lerp_(self.averages, self.sources, 1.0 - decay_at(step, self.limit))
