"""Random numbers as a pure function of keys.

A draw depends on its keys alone, say (seed, step, sample), and not on batch size, number of
processes, device or what was drawn before. So a resumed run equals an uninterrupted one, and a seed
names one picture.

The generator is SplitMix64 in counter mode (Steele, Lea & Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014): value n of key k is mix(k + n·γ). It runs on whatever device the
keys are on, for all samples at once.

Shape letters: B keys, usually one per sample.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

# SplitMix64's constants, as signed integers, since torch has no arithmetic of uint64. Its int64
# wraps around, so that products and sums have the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right with zeros from the left; torch's own shift copies the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: every bit of the result depends on every bit of x."""
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def fold(*parts: int | Tensor) -> Tensor:
    """Make one key of several integers, each an int or an int64 tensor [B] → int64 [B].

    Their order matters. The key of ints alone is a scalar on the CPU.
    """
    device = next((part.device for part in parts if isinstance(part, Tensor)), torch.device("cpu"))
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        number = (
            part
            if isinstance(part, Tensor)
            else torch.tensor(part, dtype=torch.int64, device=device)
        )
        # The finalizer comes before and after each part, so that neighbouring numbers, such as
        # steps and samples, make unrelated keys.
        key = _mix(_mix(key + _GAMMA) ^ (number + 1) * _GAMMA)
    return key


def bits(keys: Tensor, count: int) -> Tensor:
    """Draw uniform 64-bit integers: keys [B] → int64 [B, count]."""
    counter = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device)
    return _mix(keys.unsqueeze(-1) + counter * _GAMMA)


def uniform(keys: Tensor, *shape: int) -> Tensor:
    """Draw uniformly from (0, 1), never 0 nor 1: keys [B] → float32 [B, *shape]."""
    # (n + ½)/2²³ of 23 random bits n: float32 holds every value exactly, the largest is 1 − 2⁻²⁴.
    drawn = _shift_right(bits(keys, math.prod(shape)), 41)
    return ((drawn.to(torch.float32) + 0.5) * 2.0**-23).reshape(*keys.shape, *shape)


def number(*parts: int) -> float:
    """Draw one Python float, uniform in [0, 1), for a key of several integers.

    For numbers that shapes depend on, such as an image's size. Reading one from a tensor on a GPU
    would wait for all work before it.
    """
    return random.Random(repr(parts)).random()


def normal(keys: Tensor, *shape: int) -> Tensor:
    """Draw from the standard normal, by Box & Muller (1958): keys [B] → float32 [B, *shape]."""
    count = math.prod(shape)
    half = (count + 1) // 2
    u = uniform(keys, 2, half)
    radius = torch.sqrt(-2.0 * torch.log(u[..., 0, :]))
    angle = (2.0 * math.pi) * u[..., 1, :]
    drawn = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)
    return drawn[..., :count].reshape(*keys.shape, *shape)


def subset(keys: Tensor, total: int, count: int) -> Tensor:
    """Draw distinct indices of range(total), in random order: keys [B] → int64 [B, count]."""
    order = bits(keys, total)
    return (
        torch.topk(order, count, dim=-1).indices if count < total else torch.argsort(order, dim=-1)
    )
