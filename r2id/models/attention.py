"""Dense attention with normalised queries and keys, and a learned window in coordinates.

Shape letters: B batch · N queries · M keys · D width · H heads · d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from r2id.config.models import WINDOW_DIMS

_NO_PLACES = "attention with a Gaussian window needs the places of its queries and keys"
# On a CPU, plain products are faster than the fused kernel up to this number of scores.
_FAST_PLAIN = 1 << 24
# A context variable: one thread may count memory as on a GPU while another one draws samples.
_PLAIN_UP_TO: ContextVar[float] = ContextVar("plain_up_to", default=_FAST_PLAIN)


class RMSNorm(nn.RMSNorm):
    """RMSNorm of the last dimension, in the input's dtype.

    PyTorch's own takes its slow path under autocast, where input and weight differ in dtype, and
    returns float32 on CUDA. Here autocast is off: the kernel sums in float32 all the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not as_on_gpu(x.device):
            if torch.is_grad_enabled():
                return _RmsNorm.apply(x, self.weight, self.eps)
            return _rms_normed(x, self.weight, self.eps)[0]
        weight = None if self.weight is None else self.weight.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class _RmsNorm(torch.autograd.Function):
    """x / √(mean(x²) + ε)·weight, for CPUs.

    A CPU has no fused kernel: PyTorch keeps float32 copies of every intermediate for the backward
    pass and takes twice as long. This function keeps one scale per row and x. Without a weight it
    keeps its output instead of x, which costs nothing, as the next operation keeps that too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float | None) -> Tensor:
        out, scale = _rms_normed(x, weight, eps)
        ctx.save_for_backward(out if weight is None else x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        kept, weight, scale = ctx.saved_tensors
        gradient, wide = gradient.to(scale.dtype), kept.to(scale.dtype)
        # The norm does not change along x itself, so that part of the gradient is taken out.
        if weight is None:
            weight_gradient = None
            along = torch.linalg.vecdot(gradient, wide).unsqueeze(-1)
        else:
            product, rows = (gradient * wide).flatten(0, -2), scale.flatten()
            weight_gradient = rows @ product
            along = (product @ weight.to(scale.dtype)).mul_(rows.square()).view(scale.shape)
            gradient = gradient * weight
        out = torch.addcmul(gradient, wide, along, value=-1 / kept.shape[-1]).mul_(scale)
        return out.to(kept.dtype), weight_gradient, None


def _rms_normed(x: Tensor, weight: Tensor | None, eps: float | None) -> tuple[Tensor, Tensor]:
    """RMSNorm of [..., D] → the normed in x's dtype, contiguous, and the scales [..., 1]."""
    # A copy, on which the rest is done in place. Heads that were cut out of rows are put together.
    wide = x.to(
        torch.promote_types(x.dtype, torch.float32),
        copy=True,
        memory_format=torch.contiguous_format,
    )
    mean = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    scale = mean.add_(torch.finfo(wide.dtype).eps if eps is None else eps).rsqrt_()
    wide.mul_(scale)
    return (wide if weight is None else wide.mul_(weight)).to(x.dtype), scale


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention: q [B, H, N, d], k and v [B, H, M, d] → [B, H, N, d].

    ``mask`` bool [B, 1, 1, M] says which keys are seen, at least one.

    On a CPU, small grids take plain products: the fused kernel's backward pass is 3 to 8 times
    slower in bfloat16 (tests/bench/attention.py). Large grids take the fused kernel, whose memory
    does not grow with N·M.
    """
    if q.device.type == "cpu" and q[..., 0].numel() * k.shape[-2] <= _most_plain_scores():
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        # In float32, as autocast has it; PyTorch's softmax takes twice as long to convert them
        # itself. Rounding the result costs little: the product still sums in float32.
        return torch.softmax(scores.float(), dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, mask)


@contextmanager
def plain_up_to(scores: float) -> Iterator[None]:
    """Compute attention on a CPU by plain products up to this number of scores, fused above it.

    Holds inside the ``with`` block, in this thread alone. r2id.models.tracing counts what a GPU
    would keep with 0, and all products of attention with infinity.
    """
    token = _PLAIN_UP_TO.set(scores)
    try:
        yield
    finally:
        _PLAIN_UP_TO.reset(token)


def _most_plain_scores() -> float:
    """Return up to how many scores a CPU computes attention by plain products here."""
    # torch.compile cannot trace a context variable, and compiled code is never counted.
    return _FAST_PLAIN if torch.compiler.is_compiling() else _PLAIN_UP_TO.get()


def linear_together(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Apply several linear layers without biases to one input, as one matrix product.

    Weights keep their own names, and are put together anew at each call: that costs little beside
    the product, and three small products cost more than a large one. Not so in training on a CPU,
    where the parts of one result have to be copied for the backward pass.
    """
    if torch.is_grad_enabled() and not as_on_gpu(x.device):
        return tuple(layer(x) for layer in layers)
    weight = torch.cat([layer.weight for layer in layers])
    return F.linear(x, weight).split([layer.out_features for layer in layers], dim=-1)


class Context(NamedTuple):
    """What queries attend to, made by ``Attention.context``."""

    keys: Tensor
    """[B, H, M, d], with the dimensions of a window if there is one."""
    values: Tensor
    """[B, H, M, d]."""


def as_on_gpu(device: torch.device) -> bool:
    """Tell whether to compute as on a GPU: it is one, or its memory is being counted."""
    return device.type != "cpu" or not _most_plain_scores()


class Attention(nn.Module):
    """Multi-head attention from queries [B, N, D] to context [B, M, D'].

    With ``gaussian_window``, head h adds −s_h·|u_q − u_k|² to its logits: a Gaussian window around
    the query, with u in cells of the latent grid and s_h learned. It costs nothing, because
    −s·|u_q − u_k|² = s·(2·u_q·u_k − |u_k|² − |u_q|²) is itself a dot product, which takes six
    dimensions of the head.
    """

    def __init__(
        self, width: int, context_width: int, heads: int, gaussian_window: bool = False
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        content = width - WINDOW_DIMS * heads if gaussian_window else width
        self.query = nn.Linear(width, content, bias=False)
        self.key = nn.Linear(context_width, content, bias=False)
        self.value = nn.Linear(context_width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = RMSNorm(content // heads)
        self.key_norm = RMSNorm(content // heads)
        # Reach is 1/s, from 1 to e⁵ over the heads: windows start with standard deviations √(1/2s)
        # of 0.7 to 8.6 cells, so that heads start out different.
        self.log_reach = nn.Parameter(torch.linspace(0.0, 5.0, heads)) if gaussian_window else None

    def forward(
        self,
        x: Tensor,
        context: Tensor | Context,
        places: Tensor | None = None,
        context_places: Tensor | None = None,
        mix: Callable[[Tensor, Tensor, Tensor], Tensor] = attend,
    ) -> Tensor:
        """Let queries x [B, N, D] attend to a context [B, M, D'] → [B, N, D].

        ``places`` [B or 1, N, 2] of the queries and ``context_places`` [B or 1, M, 2] of the keys
        are in cells; a Gaussian window needs them. ``mix`` computes the attention.
        """
        if isinstance(context, Context):
            q, (k, v) = self.query_norm(self._heads(self.query(x))), context
        elif x is context:
            together = linear_together(x, self.query, self.key, self.value)
            q, k, v = map(self._heads, together)
            q, k = self.query_norm(q), self.key_norm(k)
        else:
            q = self.query_norm(self._heads(self.query(x)))
            k, v = self._keys_and_values(context)
        if self.log_reach is not None:
            q = self._query_with_window(q, places)
            k = k if isinstance(context, Context) else _key_with_window(k, context_places)
        return self.out(rearrange(mix(q, k, v), "b h n d -> b n (h d)").to(x.dtype))

    def context(self, context: Tensor, context_places: Tensor | None = None) -> Context:
        """Make keys and values once, for several calls that see all of a context."""
        k, v = self._keys_and_values(context)
        if self.log_reach is not None:
            k = _key_with_window(k, context_places)
        return Context(k, v)

    def _keys_and_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        k, v = map(self._heads, linear_together(context, self.key, self.value))
        return self.key_norm(k), v

    def _heads(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (h d) -> b h n d", h=self.heads)

    def _query_with_window(self, q: Tensor, places: Tensor | None) -> Tensor:
        """Append the window's dimensions, whose dot product with a key's is −s·|u_q − u_k|²."""
        assert self.log_reach is not None
        if places is None:
            raise ValueError(_NO_PLACES)
        # attend divides logits by √d, which the window's must not be: it is multiplied in here.
        sharpness = torch.exp(-self.log_reach).view(1, -1, 1, 1) * math.sqrt(self.head_dim)
        places = places.unsqueeze(1)
        ones = torch.ones_like(places)
        own = _in_two(sharpness * places.square().sum(-1, keepdim=True), q.dtype)
        window = torch.cat([sharpness * torch.cat([2.0 * places, -ones], dim=-1), -own], dim=-1)
        return torch.cat([q, _spread(window, q)], dim=-1)


def _key_with_window(k: Tensor, places: Tensor | None) -> Tensor:
    """Append the window's dimensions to keys, as _query_with_window does to queries."""
    if places is None:
        raise ValueError(_NO_PLACES)
    places = places.unsqueeze(1)
    squares = _in_two(places.square().sum(-1, keepdim=True), k.dtype)
    window = torch.cat([places, squares, torch.ones_like(places)], dim=-1)
    return torch.cat([k, _spread(window, k)], dim=-1)


def _in_two(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Split a column into two that sum to it, a rounded one and its rest: [..., 1] → [..., 2].

    Near its query, a window's value is the small difference of large squares. Rounded to bfloat16
    in one number, they would lose it.
    """
    coarse = x.to(dtype).to(x.dtype)
    return torch.cat([coarse, x - coarse], dim=-1)


def _spread(window: Tensor, like: Tensor) -> Tensor:
    """Repeat [B or 1, H or 1, N, 6] → [B, H, N, 6] in the dtype of ``like``."""
    return window.to(like.dtype).expand(*like.shape[:3], -1)
