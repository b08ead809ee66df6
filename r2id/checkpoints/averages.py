"""Power-function averages of weights, from which an average of any width is reconstructed later.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C.

The average at step t counts the weights of step τ with p_γ,t(τ) = (γ + 1)·τ^γ / t^(γ+1), its
profile. The profile's width σ_rel is its standard deviation relative to t: 0.05 means that the
average looks back about a twentieth of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from r2id.config import TrainConfig

Profile = tuple[float, float]
"""(σ_rel, t): a profile's width, and the number of steps done."""


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
    """Fit a wanted profile by a weighted sum of those of snapshots (algorithm 3: least squares).

    Returns the weights c, which sum to 1, and the relative error ‖Σ c_i·p_i − p‖ / ‖p‖: 0 is exact,
    1 is no likeness.
    """
    gram = np.array([[product(one, other) for other in snapshots] for one in snapshots])
    towards = np.array([product(one, wanted) for one in snapshots])
    norms = np.sqrt(np.diag(gram))  # with profiles of norm 1 the system is far better conditioned
    found = np.linalg.lstsq(gram / np.outer(norms, norms), towards / norms, rcond=None)[0] / norms
    found /= found.sum()
    squared = product(wanted, wanted)
    misfit = (found @ gram @ found - 2 * found @ towards + squared) / squared
    return found.tolist(), float(max(misfit, 0.0) ** 0.5)


def widths(train: TrainConfig) -> dict[str, float]:
    """The power-function averages that a run keeps: kind of tensors in its checkpoints → σ_rel.

    Sampling uses the first. Empty for a run with one average of constant decay.
    """
    return {
        "ema" if number == 0 else f"ema-{sigma}": sigma
        for number, sigma in enumerate(train.ema_profiles)
    }
