"""Exponential moving averages (EMA) of weights.

A run keeps one with a fixed decay, or several by power functions (r2id.checkpoints.averages).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from r2id.checkpoints.averages import exponent_of, widths
from r2id.config import TrainConfig

Decay = Callable[[int], float]
"""Step (from 0) → decay of the update after it."""


def decay_at(step: int, limit: float) -> float:
    """Return the decay of the update after step ``step`` (from 0), warmed up to ``limit``.

    min(limit, (1 + step) / (10 + step)), as in the exponential moving average of TensorFlow's
    ``num_updates``: early weights, which are noise, are soon forgotten.
    """
    return min(limit, (1 + step) / (10 + step))


def power_decay(step: int, exponent: float) -> float:
    """Return the decay β = (1 − 1/t)^(γ+1) at t = step + 1, for an exponent γ.

    It makes the average of step t exactly the sum over steps of their weights times the integral of
    the profile p_γ,t over the step.
    """
    return (1 - 1 / (step + 1)) ** (exponent + 1)


def decays(train: TrainConfig) -> dict[str, Decay]:
    """Return the averages that a run keeps: kind in its checkpoints → decay.

    ``ema`` is the one that sampling uses.
    """
    if not train.ema_profiles:
        return {"ema": partial(decay_at, limit=train.ema)}
    return {
        kind: partial(power_decay, exponent=exponent_of(sigma))
        for kind, sigma in widths(train).items()
    }


class Ema:
    """Averages of float tensors, kept beside them on the same device.

    Which tensors is up to the caller: a model's parameters, or, where an optimizer's state is
    spread over ranks, this rank's share of them: averaging is elementwise and needs no
    communication. A model's buffers are state and not weights: who exports an average takes them
    from the model as they are.
    """

    def __init__(self, sources: Sequence[Tensor], decays: Mapping[str, Decay]) -> None:
        self.sources = [source.detach() for source in sources]
        self.decays = dict(decays)
        self.averages = {kind: [source.clone() for source in self.sources] for kind in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Set average ← decay·average + (1 − decay)·source, after optimizer step ``step``."""
        for kind, decay in self.decays.items():
            torch._foreach_lerp_(self.averages[kind], self.sources, 1.0 - decay(step))
