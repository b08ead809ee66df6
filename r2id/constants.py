"""Tensors that follow from sizes alone: made once, sent to their device once, and kept.

Making a tensor of Python numbers on a GPU makes the host wait for all of the GPU's work. So
constants are made on the CPU and sent without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")
_collecting: list[list[Any]] = []


@contextmanager
def hold_cached() -> Iterator[list[Any]]:
    """Collect what functions of ``cached_tensors`` return within the block.

    A CUDA graph reads tensors where they were when it was recorded, so it must hold them.
    """
    found: list[Any] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.remove(found)


def cached_tensors(most: int = 64) -> Callable[[Callable[_Given, _Made]], Callable[_Given, _Made]]:
    """Keep the last ``most`` results of a function that makes tensors of hashable arguments.

    Its tensors are shared: nothing may write to them. Nothing is cached under FakeTensorMode, whose
    tensors have no contents, and other dispatch modes, nor while torch.compile traces.
    """

    def decorate(make: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
        remembered = lru_cache(maxsize=most)(make)

        @wraps(make)
        def made(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
            if torch.compiler.is_compiling() or _get_current_dispatch_mode_stack():
                return make(*args, **kwargs)
            # A tensor made in inference mode could not be used in training.
            with torch.inference_mode(False):
                result = remembered(*args, **kwargs)  # type: ignore[arg-type]
            for found in _collecting:
                found.append(result)
            return result

        return made

    return decorate


@cached_tensors(256)
def constant(values: tuple[float, ...], device: torch.device | None = None) -> Tensor:
    """Return numbers as a tensor: float32 [n]."""
    return torch.tensor(values, dtype=torch.float32).to(device, non_blocking=True)
