"""Random numbers as a pure function of keys.

A draw depends on its keys alone, say (seed, step, sample), and not on batch size, number of
processes, device or what was drawn before. So a resumed run equals an uninterrupted one, and a seed
names one picture.

The generator is SplitMix64 in counter mode (Steele, Lea & Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014): value n of key k is mix(k + n·γ). Values are computed for all
samples at once, on whatever device they are wanted. Keys are few: they are folded on the CPU.

Shape letters: B keys, usually one per sample · S streams of random numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from r2id.constants import cached_tensors, constant

# SplitMix64's constants, as signed integers, since torch has no arithmetic of uint64. Its int64
# wraps around, so that products and sums have the same bits.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


_ALL_BITS = (1 << 64) - 1
_KEPT = 1 << 16  # the longest counter that is kept: half a megabyte

Shape = tuple[int, ...]


def _signed(x: int) -> int:
    """Wrap an integer around to int64."""
    x &= _ALL_BITS
    return x - (1 << 64) if x >> 63 else x


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Shift right with zeros from the left; torch's own shift copies the sign bit."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_high(x: Tensor) -> Tensor:
    """SplitMix64's finalizer up to its last step, which leaves the highest 31 bits alone."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_MIX1)
    return _shift_right(x, 27).bitwise_xor_(x).mul_(_MIX2)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer: every bit of the result depends on every bit of x."""
    x = _mix_high(x)
    return _shift_right(x, 31).bitwise_xor_(x)


def _mix_int(x: int) -> int:
    """Do what ``_mix`` does to one integer from 0 to 2^64 − 1."""
    x = ((x ^ (x >> 30)) * _MIX1) & _ALL_BITS
    x = ((x ^ (x >> 27)) * _MIX2) & _ALL_BITS
    return x ^ (x >> 31)


def fold(*parts: int | Tensor) -> Tensor:
    """Make one key of several integers, each an int or an int64 tensor [B] → int64 [B].

    Their order matters. The key of ints alone is a scalar on the CPU.
    """
    # The finalizer comes before and after each part, so that neighbouring numbers, such as steps
    # and samples, make unrelated keys.
    key: int | Tensor = 0
    for part in parts:
        if not isinstance(part, Tensor):
            number = ((int(part) + 1) * _GAMMA) & _ALL_BITS
            if isinstance(key, int):
                key = _mix_int(_mix_int((key + _GAMMA) & _ALL_BITS) ^ number)
                continue
            key = _mix(_mix(key + _GAMMA).bitwise_xor_(_signed(number)))
        elif isinstance(key, int):
            mixed = _signed(_mix_int((key + _GAMMA) & _ALL_BITS))
            key = _mix(((part + 1) * _GAMMA).bitwise_xor_(mixed))
        else:
            key = _mix(_mix(key + _GAMMA) ^ (part + 1) * _GAMMA)
    return torch.tensor(_signed(key)) if isinstance(key, int) else key


def bits(keys: Tensor, count: int) -> Tensor:
    """Draw uniform 64-bit integers: keys [B] → int64 [B, count]."""
    return _mix(_states(keys, count))


def _states(keys: Tensor, count: int) -> Tensor:
    """Return states of the counter, which _mix turns into values: keys [B] → int64 [B, count]."""
    return keys.unsqueeze(-1) + _counter(count, keys.device)


def _counter(count: int, device: torch.device) -> Tensor:
    """Return n·γ for n from 1 to ``count``: int64 [count]."""
    length = 1 << (count - 1).bit_length()
    return (_kept_counter if length <= _KEPT else _new_counter)(length, device)[:count]


def _new_counter(count: int, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int64, device=device).mul_(_GAMMA)


_kept_counter = cached_tensors()(_new_counter)


def _uniform_of(states: Tensor) -> Tensor:
    """Make numbers in (0, 1) of states, in their shape."""
    # (n + ½)/2²³ of 23 random bits n: float32 holds every value exactly, the largest is 1 − 2⁻²⁴.
    numbers = _shift_right(_mix_high(states), 41)
    return (numbers + constant((0.5,), states.device)).mul_(2.0**-23)


def uniform(keys: Tensor, *shape: int) -> Tensor:
    """Draw uniformly from (0, 1), never 0 nor 1: keys [B] → float32 [B, *shape]."""
    return _uniform_of(_states(keys, math.prod(shape))).reshape(*keys.shape, *shape)


def number(*parts: int) -> float:
    """Draw one Python float, uniform in [0, 1), for a key of several integers.

    For numbers that shapes depend on, such as an image's size. Reading one from a tensor on a GPU
    would wait for all work before it.
    """
    # As plain ints: the text of an IntEnum is another one.
    return random.Random(repr(tuple(map(int, parts)))).random()


def normal(keys: Tensor, *shape: int, device: torch.device | None = None) -> Tensor:
    """Draw from the standard normal, by Box & Muller (1958): keys [B] → float32 [B, *shape].

    On ``device``, by default that of the keys.
    """
    return normals(keys.unsqueeze(-1), [shape], device)[0]


def normals(
    keys: Tensor, shapes: Sequence[Shape], device: torch.device | None = None
) -> list[Tensor]:
    """Draw what ``normal`` does for several streams at once, which a GPU does in fewer kernels.

    Keys [B, S] and the shapes of the S streams → for each of them float32 [B, *shape].
    """
    if device is not None:
        keys = keys.to(device, non_blocking=True)
    counts = [math.prod(shape) for shape in shapes]
    halves = [(count + 1) // 2 for count in counts]
    counter = _counter(2 * max(halves), keys.device)
    states = [
        key[..., None, None] + counter[: 2 * half].view(2, half)
        for key, half in zip(keys.unbind(-1), halves, strict=True)
    ]
    u = _uniform_of(states[0] if len(states) == 1 else torch.cat(states, dim=-1))
    radius = u[..., 0, :].log().mul_(-2.0).sqrt_()
    angle = (2.0 * math.pi) * u[..., 1, :]
    pairs = torch.empty_like(u)
    torch.mul(radius, angle.cos(), out=pairs[..., 0, :])
    torch.mul(radius, angle.sin(), out=pairs[..., 1, :])
    return [
        drawn.flatten(-2)[..., :count].reshape(*keys.shape[:-1], *shape)
        for drawn, count, shape in zip(pairs.split(halves, dim=-1), counts, shapes, strict=True)
    ]


def subset(keys: Tensor, total: int, count: int) -> Tensor:
    """Draw distinct indices of range(total), in random order: keys [B] → int64 [B, count]."""
    return subsets(keys.unsqueeze(-1), [(total, count)])[0]


def subsets(keys: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Draw what ``subset`` does for several streams at once, which a GPU does in fewer kernels.

    Keys [B, S] and (total, count) of the S streams → for each of them int64 [B, count].
    """
    orders = bits(keys, max(total for total, _ in sizes)).unbind(-2)
    return [
        torch.topk(order[..., :total], count, dim=-1).indices
        if count < total
        else torch.argsort(order[..., :total], dim=-1)
        for order, (total, count) in zip(orders, sizes, strict=True)
    ]
