"""Finding out where a loss or gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def blame(loss: nn.Module, forward: Callable[[], Any]) -> str:
    """Name the first place that holds a value which is not finite, in words.

    That is a parameter, or a module's input or output when ``forward`` runs the suspected batch
    through the loss module once more, or else the backward pass.
    """
    for name, parameter in loss.named_parameters():
        if not _finite(parameter):
            return f"parameter {name.removeprefix('model.')} holds values that are not finite"
    found: list[str] = []
    with _watched(loss, found):
        forward()
    return found[0] if found else "the loss is finite: the gradient overflows in the backward pass"


@contextmanager
def _watched(loss: nn.Module, found: list[str]) -> Iterator[None]:
    """Within this block modules note in ``found`` what goes wrong in them, innermost first."""

    def watch(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                where = f"module {name.removeprefix('model.')}" if name else "the loss"
                found.append(
                    f"{where} is given values that are not finite"
                    if not _finite(inputs)
                    else f"{where} makes values that are not finite"
                )

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in loss.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return all(map(_finite, value.values())) if isinstance(value, dict) else True
