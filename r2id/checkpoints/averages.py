"""Power-function averages of weights, and averages of other widths reconstructed from them.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models",
arXiv:2312.02696, section 3 and appendix C.

In the average at step t, the weights of step τ count p_γ,t(τ) = (γ + 1)·τ^γ / t^(γ+1): this is the
average's profile. The profile's width σ_rel is its standard deviation relative to t: 0.05 means
that the average looks back about a twentieth of the training.
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
    """Return the exponent γ of a width σ_rel in (0, 1/√12).

    It is the positive root of γ³ + 7γ² + (16 − σ⁻²)γ + 12 − σ⁻², where
    σ² = (γ + 1) / ((γ + 2)²·(γ + 3)).
    """
    return float(np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2]).real.max())


def product(one: Profile, other: Profile) -> float:
    """Return the inner product of two profiles: ∫ p_a(τ)·p_b(τ) dτ over the steps of both."""
    (a, t_a), (b, t_b) = ((exponent_of(sigma), t) for sigma, t in (one, other))
    earlier, later = ((a, t_a), (b, t_b)) if t_a <= t_b else ((b, t_b), (a, t_a))
    # The ratio of the steps is taken to a power, because powers of steps alone would overflow.
    return ((a + 1) * (b + 1) / (a + b + 1) / later[1]) * (earlier[1] / later[1]) ** later[0]


def reconstruction(snapshots: Sequence[Profile], wanted: Profile) -> tuple[list[float], float]:
    """Fit a wanted profile by a weighted sum of snapshots' profiles (algorithm 3: least squares).

    Returns the coefficients c_i, which sum to 1, and the relative error ‖Σ c_i·p_i − p‖ / ‖p‖,
    which is 0 for an exact fit and about 1 when there is no likeness.
    """
    gram = np.array([[product(one, other) for other in snapshots] for one in snapshots])
    target = np.array([product(one, wanted) for one in snapshots])
    norms = np.sqrt(np.diag(gram))  # with profiles of norm 1 the system is far better conditioned
    fit = np.linalg.lstsq(gram / np.outer(norms, norms), target / norms, rcond=None)[0] / norms
    fit /= fit.sum()
    squared = product(wanted, wanted)
    misfit = (fit @ gram @ fit - 2 * fit @ target + squared) / squared
    return fit.tolist(), float(max(misfit, 0.0) ** 0.5)


def widths(train: TrainConfig) -> dict[str, float]:
    """Return the widths of a run's power-function averages: kind of tensors in checkpoints → σ_rel.

    Sampling uses the first. Empty for a run that keeps one average of fixed decay.
    """
    return {
        "ema" if number == 0 else f"ema-{sigma}": sigma
        for number, sigma in enumerate(train.ema_profiles)
    }
