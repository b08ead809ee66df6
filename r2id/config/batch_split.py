"""Splitting the global batch into one share per process, and each share into micro-batches."""

from __future__ import annotations

from r2id.config.training import TrainConfig
from r2id.errors import InputError


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Return the number of samples per forward pass of one process.

    Raises InputError when the global batch does not divide evenly.
    """
    share = max(1, train.batch // world_size)
    micro = min(train.micro_batch or share, share)
    # A process's whole share is a micro-batch wherever shares are even.
    check_batch(train.batch, world_size, 1 if micro == share else micro)
    return micro


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Return the number of micro-batches of one process per optimizer step.

    Raises InputError when the global batch does not divide evenly.
    """
    return train.batch // (world_size * micro_batch_size(train, world_size))


def most_processes(train: TrainConfig, most: int) -> int:
    """Return the largest number of processes, up to ``most``, that share the batch evenly.

    Raises InputError when one process does not either.
    """
    for count in range(most, 1, -1):
        try:
            micro_batch_size(train, count)
        except InputError:
            continue
        return count
    micro_batch_size(train, 1)
    return 1


def check_batch(batch: int, world_size: int, micro_batch: int) -> None:
    """Raise InputError unless processes × micro-batch divide the batch."""
    unit = world_size * micro_batch
    if batch % unit:
        below, above = batch // unit * unit, (batch // unit + 1) * unit
        advice = f"{below} or {above}" if below else f"{above}"
        times = f" times micro-batches of {micro_batch}" if micro_batch > 1 else ""
        raise InputError(
            f"train.batch = {batch}: must be a multiple of {unit}, {world_size} processes (NPROC)"
            f"{times}; the nearest: {advice}"
        )
