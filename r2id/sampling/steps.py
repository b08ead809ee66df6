"""The steps of sampling, as callers may watch and change them.

Shape letters: b samples of a batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """An evaluation of the model while samples are drawn."""

    number: int
    """Steps so far, of all batches, from 1. Solvers of higher order evaluate some steps twice."""
    total: int
    """Steps of all batches."""
    rows: Tensor
    """Which samples are in this batch, int64 [b]; the last one may be repeated."""
    latents: Tensor
    """What their raw latents are estimated to be, [b, L, h, w]."""


Adjust = Callable[[Tensor, Tensor], Tensor]
"""(rows of the batch int64 [b], estimated raw latents [b, L, h, w]) → better ones."""
Watch = Callable[[Step], None]
"""Is told each step. An error that it raises ends the sampling."""


def watch_part(watch: Watch, part: int, batches: list[int]) -> Watch:
    """Return the watch of one of several parts, whose steps are counted through all of them."""

    def told(step: Step) -> None:
        steps = step.total // batches[part]  # of a batch, in every part
        before, total = steps * sum(batches[:part]), steps * sum(batches)
        watch(replace(step, number=before + step.number, total=total))

    return told
