"""Finding out where a loss or gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def blame(loss: nn.Module, forward: Callable[[], Any]) -> str:
    """Describe in words the first place where a value is not finite.

    Parameters are looked at first, then every module's inputs and outputs while ``forward`` runs
    the suspected batches through the loss module once more. When all of these are finite, it is the
    backward pass.
    """
    for name, parameter in loss.named_parameters():
        if not _finite(parameter):
            return f"parameter {name.removeprefix('model.')} holds values that are not finite"
    findings: list[str] = []
    with _watched(loss, findings):
        forward()
    return (
        findings[0]
        if findings
        else "the loss is finite: the gradient overflows in the backward pass"
    )


@contextmanager
def _watched(loss: nn.Module, findings: list[str]) -> Iterator[None]:
    """Within this block, append to ``findings`` the first module whose output is not finite.

    A module's hook runs before that of the module around it, so that the innermost one is named.
    """

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: Any, output: Any) -> None:
            if not findings and not _finite(output):
                where = f"module {name.removeprefix('model.')}" if name else "the loss"
                findings.append(
                    f"{where} is given values that are not finite"
                    if not _finite(inputs)
                    else f"{where} makes values that are not finite"
                )

        return hook

    handles = [
        module.register_forward_hook(make_hook(name)) for name, module in loss.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    """Tell whether all floats in nested tuples, lists and dictionaries of tensors are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    return all(map(_finite, value.values())) if isinstance(value, dict) else True
