"""Checkpoints of a run: at intervals, at milestones, at the end, and when it is stopped."""

from __future__ import annotations

from torch import Tensor

from r2id import dist
from r2id.checkpoints import writing
from r2id.models.riae import RIAE
from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState
from r2id.training.step import confirm_last_step
from r2id.training.tasks import R2idTask, RiaeTask


class Checkpoints(Callback):
    """Save checkpoints to RUN/checkpoints; every rank writes its share of the state."""

    def post_step(self, state: TrainState) -> None:
        train = state.config.train
        milestone = train.milestone_every and state.step % train.milestone_every == 0
        if not (state.due(train.save_every) or milestone or state.stopping):
            return
        confirm_last_step(state)
        state.checkpoint = writing.save(
            state.folder,
            state.engine.state(),
            state.meta(),
            keep=train.keep,
            stats=_latent_statistics(state),
            codec=_codec(state),
        )
        state.tracker.tag("checkpoint", str(state.checkpoint))


def _latent_statistics(state: TrainState) -> dict[str, Tensor] | None:
    """Measure the latents of an RIAE's averaged model on rank 0; None on other ranks and for R2ID.

    An RIAE is small enough to be gathered on one rank.
    """
    if not isinstance(state.task, RiaeTask):
        return None
    model = state.ema_model()
    if model is None:
        return None
    assert isinstance(model, RIAE)
    return state.task.latent_statistics(model, state.engine.device)


def _codec(state: TrainState) -> bytes | None:
    """Return an R2ID's RIAE as an exported model on rank 0; None on other ranks and for an RIAE."""
    return (
        state.task.codec.export() if isinstance(state.task, R2idTask) and dist.is_main() else None
    )
