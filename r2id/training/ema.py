"""Moving averages of weights: one with a fixed decay, or several by power functions, of which any other power function's
is reconstructed after training (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C).

A profile is the weight p_γ,t(τ) = (γ + 1)·τ^γ / t^(γ+1) of the weights of step τ in the average of step t. Its width is
its standard deviation relative to t, σ_rel: 0.05 means that the average looks back about a twentieth of the training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

from r2id.config import TrainConfig

Decay = Callable[[int], float]
"""Step (from 0) → decay of the update after it."""
Profile = tuple[float, float]
"""(σ_rel, t): a profile's width, and the number of steps done."""


def decay_at(step: int, limit: float) -> float:
    """Decay of the update after step ``step`` (from 0): min(limit, (1 + step) / (10 + step)), as in the exponential
    moving average of TensorFlow's ``num_updates``: early weights, which are noise, are soon forgotten."""
    return min(limit, (1 + step) / (10 + step))


def power_decay(step: int, exponent: float) -> float:
    """β = (1 − 1/t)^(γ+1) at t = step + 1, which makes the average of step t exactly the sum over steps of
    their weights times ∫p_γ,t over the step."""
    return (1 - 1 / (step + 1)) ** (exponent + 1)


@cache
def exponent_of(sigma: float) -> float:
    """γ of a width σ_rel in (0, 1/√12): the positive root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻²."""
    return float(np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max())


def width_of(exponent: float) -> float:
    """σ_rel = √((γ + 1) / ((γ + 2)²·(γ + 3))), the inverse of exponent_of."""
    return ((exponent + 1) / ((exponent + 2) ** 2 * (exponent + 3))) ** 0.5


def product(one: Profile, other: Profile) -> float:
    """∫ p_a(τ)·p_b(τ) dτ over the steps that both have seen."""
    (a, t_a), (b, t_b) = ((exponent_of(sigma), t) for sigma, t in (one, other))
    earlier, later = ((a, t_a), (b, t_b)) if t_a <= t_b else ((b, t_b), (a, t_a))
    # (t_min / t_max)^(γ of the later one): the powers of t themselves would overflow.
    return ((a + 1) * (b + 1) / (a + b + 1) / later[1]) * (earlier[1] / later[1]) ** later[0]


def reconstruction(snapshots: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Coefficients c, of sum 1, whose Σ c_i·snapshot_i comes nearest to the wanted profile (algorithm 3: least squares);
    and how far it stays away, ‖Σ c_i·p_i − p‖ / ‖p‖: 0 is exact, 1 is no likeness."""
    gram = np.array([[product(one, other) for other in snapshots] for one in snapshots])
    towards = np.array([product(one, wanted) for one in snapshots])
    norms = np.sqrt(np.diag(gram))  # with profiles of norm 1 the system is far better conditioned
    found = np.linalg.lstsq(gram / np.outer(norms, norms), towards / norms, rcond=None)[0] / norms
    found /= found.sum()
    squared = product(wanted, wanted)
    misfit = (found @ gram @ found - 2 * found @ towards + squared) / squared
    return found.tolist(), float(max(misfit, 0.0) ** 0.5)


def widths(train: TrainConfig) -> dict[str, float]:
    """The power-function profiles that a run keeps: kind in its checkpoints → σ_rel. The first is what sampling uses."""
    return {"ema" if number == 0 else f"ema-{sigma}": sigma for number, sigma in enumerate(train.ema_profiles)}


def decays(train: TrainConfig) -> dict[str, Decay]:
    """The averages that a run keeps: kind in its checkpoints → decay. ``ema`` is what sampling uses."""
    if not train.ema_profiles:
        return {"ema": partial(decay_at, limit=train.ema)}
    return {kind: partial(power_decay, exponent=exponent_of(sigma)) for kind, sigma in widths(train).items()}


class Ema:
    """Averages of float tensors, kept beside them on the same device.

    Which tensors is up to the caller: a model's parameters, or, where an optimizer's state is spread over ranks, this
    rank's share of them, since averaging is elementwise and needs no communication. A model's buffers are state and
    not weights: who exports an average takes them from the model as they are.
    """

    def __init__(self, sources: Sequence[Tensor], decays: Mapping[str, Decay]) -> None:
        self.sources = [source.detach() for source in sources]
        self.decays = dict(decays)
        self.averages = {kind: [source.clone() for source in self.sources] for kind in decays}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average ← decay·average + (1 − decay)·source, after optimizer step ``step`` (from 0)."""
        for kind, decay in self.decays.items():
            torch._foreach_lerp_(self.averages[kind], self.sources, 1.0 - decay(step))
