"""Splitting the global batch into one share per process, and each share into micro-batches."""

from __future__ import annotations

from r2id.config import TrainConfig
from r2id.data.epoch_plan import check_batch


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Return the number of samples per forward pass of one process.

    Raises InputError when the global batch does not divide evenly.
    """
    share = max(1, train.batch // world_size)
    micro = min(train.micro_batch or share, share)
    check_batch(train.batch, world_size, micro)
    return micro


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Return the number of micro-batches of one process per optimizer step.

    Raises InputError when the global batch does not divide evenly.
    """
    return train.batch // (world_size * micro_batch_size(train, world_size))
