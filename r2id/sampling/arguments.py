"""What callers of a Pipeline give, made into one type each, or refused in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2id.errors import InputError


def as_whole(name: str, value: Any) -> int:
    """Return a whole number of any type, such as NumPy's, as int; InputError for others."""
    try:
        return index(value)
    except TypeError:
        raise InputError(f"{name} {value!r}: must be a whole number") from None


def as_list(name: str, values: Any) -> list[Any]:
    """Return whole numbers or names, one or several, as a list; InputError for others."""
    # A tensor without dimensions is one number, though its type is that of several.
    several = isinstance(values, Iterable) and getattr(values, "ndim", 1) > 0
    items = values if several and not isinstance(values, str | bytes | Mapping) else [values]
    listed = [item if isinstance(item, str) else as_whole(name, item) for item in items]
    if not listed:
        raise InputError(f"{name} []: must be one or more, or left out")
    return listed


def as_seeds(seeds: Iterable[int]) -> Tensor:
    """Return seeds as int64 [B]; InputError for one that is out of range."""
    numbers = [as_whole("seed", seed) for seed in seeds]
    for seed in numbers:
        if not 0 <= seed < 2**63:
            raise InputError(f"seed {seed}: must be from 0 to {2**63 - 1}")
    return torch.tensor(numbers, dtype=torch.int64)


def as_latents(latents: Tensor | np.ndarray, channels: int) -> Tensor:
    """Return latents [B, L, h, w] of so many channels as float32.

    Raises InputError for what are none, and where they are not finite.
    """
    if not isinstance(latents, Tensor | np.ndarray):
        raise InputError(f"latents of type {type(latents).__name__}: must be a tensor")
    given = torch.as_tensor(latents).float()
    if given.dim() != 4 or given.shape[1] != channels or not given.numel():
        raise InputError(
            f"latents of shape {list(given.shape)}: must be [B, {channels}, h, w], at least 1 each"
        )
    if not given.isfinite().all():  # would be drawn black
        raise InputError("latents: some are NaN or infinite; must be finite")
    return given
