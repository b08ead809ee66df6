"""Exponential moving averages (EMA) of weights.

A run keeps one average with a fixed decay, or several with power-function profiles
(r2id.checkpoints.averages), and a guide where autoguidance is to have one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from r2id.checkpoints.averages import exponent_of, widths
from r2id.config import TrainConfig

_SNAPSHOTS_PER_RUN = 32

Decay = Callable[[int], float]
"""Maps an optimizer step (from 0) to the decay of the average's update after that step."""


def decay_at(step: int, limit: float) -> float:
    """Return the decay of the update after step ``step`` (from 0), warmed up to ``limit``.

    min(limit, (1 + step) / (10 + step)), as ``num_updates`` does in TensorFlow's
    ExponentialMovingAverage: the early weights, which are noise, are soon forgotten.
    """
    return min(limit, (1 + step) / (10 + step))


def power_decay(step: int, exponent: float) -> float:
    """Return the decay β = (1 − 1/t)^(γ+1) at t = step + 1, for an exponent γ.

    With it the average at step t is a weighted sum of the weights of all steps, where the weight of
    a step is exactly the integral of the profile p_γ,t over that step (Karras et al. 2024,
    arXiv:2312.02696, section 3.1).
    """
    return (1 - 1 / (step + 1)) ** (exponent + 1)


def decay_of_copy(step: int, steps: int) -> float:
    """Return the decay of a copy that follows its source in the first ``steps`` updates alone."""
    return 0.0 if step < steps else 1.0


def decays(train: TrainConfig) -> dict[str, Decay]:
    """Return the decay of each average that a run keeps, by the average's kind in checkpoints.

    Sampling uses the kind ``ema``. The kind ``guide`` is a copy of that one which no longer changes
    after a share of the run, and is what autoguidance moves away from.
    """
    kept: dict[str, Decay] = {
        kind: partial(power_decay, exponent=exponent_of(sigma))
        for kind, sigma in widths(train).items()
    } or {"ema": partial(decay_at, limit=train.ema)}
    if train.guide_after is not None:
        steps = max(1, round(train.guide_after * train.steps))
        kept["guide"] = partial(decay_of_copy, steps=steps)
    return kept


def snapshot_interval(train: TrainConfig) -> int:
    """Return the number of steps between copies of the averages of ``ema_profiles``."""
    return train.ema_snapshot_every or math.ceil(train.steps / _SNAPSHOTS_PER_RUN)


class Ema:
    """Averages of float tensors, kept beside them on the same device.

    The tensors are a model's parameters, or this rank's share of them when ranks share the
    optimizer's state: averaging is elementwise and needs no communication. A model's buffers are
    not averaged; an exported average takes them from the model as they are.
    """

    def __init__(self, sources: Sequence[Tensor], decays: Mapping[str, Decay]) -> None:
        self.sources = [source.detach() for source in sources]
        self.decays = dict(decays)
        self.averages = {kind: [source.clone() for source in self.sources] for kind in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Set average ← decay·average + (1 − decay)·source, after optimizer step ``step``.

        The source is the weights; of the guide, it is the average ``ema`` after this step.
        """
        for kind, decay in self.decays.items():
            share = 1.0 - decay(step)
            if share:
                # A copy, so that the guide of a run that goes on can be that of a later step.
                sources = self.averages["ema"] if kind == "guide" else self.sources
                torch._foreach_lerp_(self.averages[kind], sources, share)
