"""Taking rows of a tensor by index, so that the backward pass knows where each row went.

PyTorch's own backward passes of indexing find that out: on a GPU they sort the index, or add with
atomics, in an order that is another one each time. Here whoever takes rows says who took each of
them, and the gradient is one look-up.

Shape letters: B batch · M rows of a sample · N rows that are taken · R the most takers of a row ·
D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from r2id.constants import cached_tensors


def permute_rows(
    x: Tensor, order: Tensor, inverse: Tensor, dim: int, padding: Tensor | None = None
) -> Tensor:
    """Take the rows ``order`` int64 [N] of dimension ``dim`` of x, each of M rows at most once.

    ``inverse`` int64 [M] says which of the N each row became. It holds where ``padding`` bool [M]
    is False; the other rows were not taken, or into padding, from where no gradient comes.
    """
    return _PermuteRows.apply(x, order, inverse, dim, padding)


class _PermuteRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, dim: int, padding: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(inverse, padding)
        ctx.dim = dim
        return x.index_select(dim, order)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        inverse, padding = ctx.saved_tensors
        found = gradient.index_select(ctx.dim, inverse)
        if padding is not None:
            shape = (-1, *[1] * (found.dim() - 1 - ctx.dim % found.dim()))
            found = found.masked_fill_(padding.view(shape), 0.0)
        return found, None, None, None, None


@dataclass(frozen=True)
class InverseIndex:
    """Who takes each row of a tensor."""

    index: Tensor
    """Which of the rows that are taken are copies of each row: int64 [B or 1, M, R]."""
    real: Tensor
    """False where a row has fewer takers than R: bool [B or 1, M, R]."""


def inverted(index: Tensor, rows: int) -> InverseIndex:
    """Find the takers where no row is taken twice: index int64 [B, N] into M rows → R = 1."""
    batch, count = index.shape
    takers = torch.full((batch, rows), -1, dtype=torch.int64, device=index.device)
    number = torch.arange(count, device=index.device).expand(batch, -1)
    takers = takers.scatter_(1, index, number).unsqueeze(-1)
    return InverseIndex(takers.clamp(min=0), takers >= 0)


def gather_rows(x: Tensor, index: Tensor, takers: InverseIndex) -> Tensor:
    """Take rows of each sample: x [B, M, D], index int64 [B or 1, N] → [B, N, D].

    The gradient of a row is the sum of those of its ``takers``.
    """
    return _GatherRows.apply(x, index, takers.index, takers.real)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, takers: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(takers, real)
        return F.embedding(_of_all_samples(index, x), x.reshape(-1, x.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        takers, real = ctx.saved_tensors
        batch, _, width = gradient.shape
        index = _of_all_samples(takers, gradient)
        weights = real.to(gradient.dtype).expand(batch, -1, -1).flatten()
        starts = _starts(index.numel() // takers.shape[2], takers.shape[2], gradient.device)
        rows, summed = gradient.reshape(-1, width), 0
        # One kernel, which sums in the order of the takers.
        found, *_ = torch.embedding_bag(
            rows, index.flatten(), starts, False, summed, False, weights
        )
        return found.view(batch, -1, width), None, None, None


def _of_all_samples(index: Tensor, x: Tensor) -> Tensor:
    """Make indices into the rows of each sample ones into those of all: [B or 1, …] → [B, …]."""
    if len(x) == 1:
        return index
    return index + _starts(len(x), x.shape[1], x.device).view(-1, *[1] * (index.dim() - 1))


@cached_tensors()
def _starts(count: int, step: int, device: torch.device) -> Tensor:
    """Return 0, step, …: int64 [count]."""
    return (step * torch.arange(count)).to(device, non_blocking=True)
