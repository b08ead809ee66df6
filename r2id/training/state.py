"""What training needs to go on, in the one form that every engine and the checkpoints share: whole float32 tensors by
the model's own parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from r2id.errors import InputError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class EngineState:
    """All that training needs to go on, by parameter name: float32 tensors on the CPU."""

    model: Tensors
    """Weights, and the model's buffers."""
    ema: Tensors
    """Their moving average, and the same buffers."""
    exp_avg: Tensors
    """Adam's first moment."""
    exp_avg_sq: Tensors
    """Adam's second moment."""
    step: int
    """Optimizer steps done."""


def check_fits(state: EngineState, model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """InputError when a state is not of this model: names and shapes of its parameters, names of its buffers."""
    for part in (state.exp_avg, state.exp_avg_sq, state.model, state.ema):
        for name, shape in shapes.items():
            if name not in part:
                raise InputError(f"checkpoint: has no {name}; it is of another model")
            if part[name].shape != shape:
                raise InputError(f"checkpoint: {name} has shape {tuple(part[name].shape)}, the model's is "
                                 f"{tuple(shape)}; it is of another model")
    unknown = set(state.model) - set(model.state_dict())
    if unknown:
        raise InputError(f"checkpoint: has {min(unknown)}, the model has not; it is of another model")


def buffers(model: nn.Module) -> Tensors:
    """The model's persistent buffers, by name, as they are: not averaged, for they are not weights."""
    parameters = {name for name, _ in model.named_parameters()}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


def to_cpu(tensors: Tensors) -> Tensors:
    """Copies that later updates do not change."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
