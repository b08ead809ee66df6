"""Splitting the global batch into one share per process, and each share into micro-batches."""

from __future__ import annotations

from r2id.config import TrainConfig
from r2id.errors import InputError


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Return the number of samples per forward pass of one process.

    Raises InputError when the global batch does not divide evenly.
    """
    share = max(1, train.batch // world_size)
    micro = min(train.micro_batch or share, share)
    unit = micro * world_size
    if train.batch % unit:
        below, above = train.batch // unit * unit, (train.batch // unit + 1) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(
            f"train.batch = {train.batch}: must be a multiple of {unit}, {world_size} processes "
            f"times micro-batches of {micro}; the nearest: {near}"
        )
    return micro


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Return the number of micro-batches of one process per optimizer step.

    Raises InputError when the global batch does not divide evenly.
    """
    return train.batch // (world_size * micro_batch_size(train, world_size))
