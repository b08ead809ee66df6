"""The losses of RIAE, one for each kind."""

from __future__ import annotations

from r2id.config import LossConfig
from r2id.models.riae import RIAE
from r2id.training.losses.points import PointLoss
from r2id.training.losses.windows import WindowLoss

RiaeLoss = WindowLoss | PointLoss

LOSSES: dict[str, type[WindowLoss] | type[PointLoss]] = {
    "lattice": WindowLoss,
    "attention": PointLoss,
}
"""Value of ``riae.kind`` → class."""


def riae_loss(model: RIAE, config: LossConfig, seed: int) -> RiaeLoss:
    """Make the loss module of a model, of its kind."""
    return LOSSES[model.config.kind](model, config, seed)
