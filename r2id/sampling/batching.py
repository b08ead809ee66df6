"""Computing many samples a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from r2id.errors import WorkError


def in_batches(compute: Callable[[Tensor], Tensor], count: int, length: int) -> Tensor:
    """Call compute(rows int64 [length]) for all rows below ``count``, and join the results.

    The last batch is filled up by repeating the last row, so that all batches have one length; see
    r2id.sampling.sampler.Sampler.sample.
    """
    parts = [
        compute(torch.arange(start, start + length).clamp(max=count - 1))[: count - start]
        for start in range(0, count, length)
    ]
    return torch.cat(parts)


@contextmanager
def explain_out_of_memory(what: str) -> Iterator[None]:
    """Within this block, raise WorkError that says ``what`` it was when memory runs out."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = ". ".join(str(error).split(". ")[:2])  # it, and how much was asked for
        raise WorkError(
            f"out of memory while {what}: a smaller size needs less, and others may hold some of "
            f"it ({reason})"
        ) from None
