"""Which RIAE an R2ID run is trained with: the one that it names when it begins, from then on."""

from __future__ import annotations

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.files import CODEC
from r2id.checkpoints.trained import Trained, open_trained
from r2id.config import R2idRun
from r2id.errors import InputError
from r2id.progress import say


def choose_codec(config: R2idRun, newest: Checkpoint | None) -> Trained | None:
    """Return the RIAE that a run with this newest checkpoint is trained with; None for pixels.

    A run that goes on takes the RIAE in its checkpoint, even if the one that ``codec`` names has
    been trained on or removed since; it says so. Raises InputError when there is none to take.
    """
    if config.codec is None:
        return None
    if newest is None or not _begun_with(config, newest):
        return _open(config)
    own = newest.codec()
    try:
        identity = open_trained(config.codec, "riae").identity
    except InputError:
        identity = None
    if identity != own.identity:
        state = "is gone" if identity is None else "is another RIAE now"
        say(
            f"codec {config.codec}: {state}; {config.run} goes on with the RIAE that it began "
            f"with, of step {own.meta.step}; choose another run directory to use another"
        )
    return own


def _begun_with(config: R2idRun, newest: Checkpoint) -> bool:
    """Tell whether a checkpoint holds the RIAE that its run's config names, by the same name."""
    own = newest.meta.stage == config.stage and CODEC in newest.files
    return own and newest.meta.config.get("codec") == str(config.codec)


def _open(config: R2idRun) -> Trained:
    assert config.codec is not None
    trained = open_trained(config.codec, "riae")
    if trained.statistics() is None:
        raise InputError(
            f"codec {config.codec}: does not hold the statistics of its latents, which are those "
            "of the default average: export it with --ema default"
        )
    return trained
