"""Blocks of both models.

Shape letters: B batch · N tokens · M context tokens · D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from r2id.models.attention import Attention, Context, RMSNorm, as_on_gpu, attend, linear_together
from r2id.models.mixing import Mix


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020).

    It has as many weights as a network of two layers whose hidden width is ``ratio`` times the
    width: three matrices of two thirds of that.
    """

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        # GPUs multiply matrices in blocks, and waste part of one that is not full.
        hidden = max(32, round(width * ratio * 2 / 3 / 32) * 32)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.value = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(_Gated.apply(*linear_together(x, self.gate, self.value)))


class _Gated(torch.autograd.Function):
    """silu(gate)·value, whose backward pass computes silu(gate) again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gate, value)
        return F.silu(gate) * value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, value = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * value, gate), gradient * F.silu(gate)


class Dropout(nn.Dropout):
    """Dropout whose mask takes one byte per element on a CPU too, and a third of the time.

    PyTorch's own keeps a mask in the input's dtype there, and draws 32 random bits per element.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        if as_on_gpu(x.device) or torch.compiler.is_compiling():
            return F.dropout(x, self.p)
        # 16 bits per element, of which a share of whole 65,536ths is dropped.
        dropped = min(round(self.p * (1 << 16)), (1 << 16) - 1)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
        bits = words.random_(-(1 << 63), None).view(torch.int16)[: x.numel()].view(x.shape)
        kept = bits >= dropped - (1 << 15)
        return x * kept * ((1 << 16) / ((1 << 16) - dropped))


class CrossBlock(nn.Module):
    """Cross-attention to a context and a feed-forward layer, both pre-norm and residual."""

    def __init__(
        self, width: int, context_width: int, heads: int, ffn_ratio: float, gaussian_window: bool
    ) -> None:
        super().__init__()
        self.norm, self.context_norm = RMSNorm(width), RMSNorm(context_width)
        self.attention = Attention(width, context_width, heads, gaussian_window)
        self.ffn_norm, self.ffn = RMSNorm(width), FeedForward(width, ffn_ratio)

    def forward(
        self,
        x: Tensor,
        context: Tensor | Context,
        places: Tensor | None = None,
        context_places: Tensor | None = None,
    ) -> Tensor:
        if isinstance(context, Tensor):
            context = self.context_norm(context)
        x = x + self.attention(self.norm(x), context, places, context_places)
        return x + self.ffn(self.ffn_norm(x))

    def context(self, context: Tensor, context_places: Tensor) -> Context:
        """Make what several calls attend to, see Attention.context."""
        return self.attention.context(self.context_norm(context), context_places)


def zero_linear(width: int, out: int) -> nn.Linear:
    """A linear layer whose output starts as zero."""
    layer = nn.Linear(width, out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ExactLinear(nn.Linear):
    """A linear layer of float32, under autocast and with bfloat16 weights too.

    On a GPU products of float32 are those of TF32; see dist.allow_tf32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] → float32 [..., M]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias.float())


def store_in_bfloat16(model: nn.Module) -> None:
    """Store in bfloat16 the weights that autocast would convert at every call, to the same result.

    For models that are only read: training needs float32 weights.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear) and not isinstance(module, ExactLinear):
            module.to(torch.bfloat16)


class Modulation(nn.Module):
    """Shift, scale and gate of each branch of a block, from the time embedding.

    All start at zero, so that a block starts as the identity (adaLN-Zero, Peebles & Xie 2023).
    """

    def __init__(self, width: int, branches: int) -> None:
        super().__init__()
        self.branches = branches
        self.linear = zero_linear(width, 3 * branches * width)

    def forward(self, time: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """time [B, D] → for each branch (shift, scale, gate), each [B, 1, D]."""
        parts = self.linear(F.silu(time)).unsqueeze(1).chunk(3 * self.branches, dim=-1)
        return [(parts[3 * i], parts[3 * i + 1], parts[3 * i + 2]) for i in range(self.branches)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x·(1 + scale) + shift."""
    return torch.addcmul(shift, x, 1.0 + scale)


def add_gated(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """Return x + gate·branch."""
    if torch.is_grad_enabled():  # the backward pass of addcmul takes more kernels
        return x + gate * branch
    return torch.addcmul(x, gate, branch)


class DiffusionBlock(nn.Module):
    """Self-attention and a feed-forward layer, modulated by time.

    With ``conditional``, cross-attention to condition tokens lies between them.
    """

    def __init__(
        self, width: int, heads: int, ffn_ratio: float, dropout: float, conditional: bool
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.modulation = Modulation(width, branches=3 if conditional else 2)
        self.norm = RMSNorm(width, elementwise_affine=False)
        self.attention = Attention(width, width, heads)
        if conditional:
            self.cross_norm = RMSNorm(width, elementwise_affine=False)
            self.context_norm = RMSNorm(width)
            self.cross = Attention(width, width, heads)
        self.ffn_norm = RMSNorm(width, elementwise_affine=False)
        self.ffn = FeedForward(width, ffn_ratio)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, time: Tensor, context: Tensor | None = None, mix: Mix = attend
    ) -> Tensor:
        """x [B, N, D], time embedding [B, D], condition tokens [B, M, D] → [B, N, D].

        ``mix`` computes self-attention, see r2id.models.mixing. Raises ValueError when the block is
        conditional and ``context`` is None.
        """
        (shift, scale, gate), *cross, (ffn_shift, ffn_scale, ffn_gate) = self.modulation(time)
        normed = modulate(self.norm(x), shift, scale)
        x = add_gated(x, gate, self.dropout(self.attention(normed, normed, mix=mix)))
        if self.conditional:
            if context is None:
                raise ValueError("a conditional block needs condition tokens")
            cross_shift, cross_scale, cross_gate = cross[0]
            normed = modulate(self.cross_norm(x), cross_shift, cross_scale)
            seen = self.cross(normed, self.context_norm(context))
            x = add_gated(x, cross_gate, self.dropout(seen))
        normed = modulate(self.ffn_norm(x), ffn_shift, ffn_scale)
        return add_gated(x, ffn_gate, self.dropout(self.ffn(normed)))
