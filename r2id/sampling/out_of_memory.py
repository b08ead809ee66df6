"""Naming what was being drawn when a GPU's memory ran out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from r2id.errors import WorkError


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
