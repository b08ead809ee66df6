"""Training in one process with plain PyTorch, on a CPU or a GPU.

It needs neither a compiler nor a process group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from r2id.checkpoints.state import EngineState, Source, Tensors, whole_layout
from r2id.config import OptimConfig, TrainConfig
from r2id.training.engines.base import (
    Engine,
    make_optimizer,
    raise_unless_finite,
    trained_model,
    trained_parameters,
)
from r2id.training.host_copy import HostCopy
from r2id.training.recording import recorded_loss


class LocalEngine(Engine):
    """Plain PyTorch in one process. Its masters are the model's own parameters."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, train: TrainConfig, device: torch.device
    ) -> None:
        self.device = device
        self.module = module.to(device).train()
        self.model = trained_model(module)
        self.clip, self.autocast = optim.clip, train.autocast
        self.optimizer = make_optimizer(module, optim)
        self.names = trained_parameters(module)
        self.shapes = {name: tuple(p.shape) for name, p in self.names.items()}
        self.masters = list(self.names.values())
        self.layout = whole_layout(self.shapes)
        self.guard = _FiniteGuard(device)
        self.late = device.type != "cpu"  # on a CPU a norm is known at once
        self.recorded = recorded_loss(module, self.masters, train, device)
        self._track_masters(module, train)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        if self.recorded is not None and torch.is_grad_enabled():
            return self.recorded.forward(batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            return self.module(**batch)

    def backward(self, loss: Tensor, accumulation: int) -> None:
        if self.recorded is not None:
            self.recorded.backward(loss, accumulation)
            return
        (loss / accumulation).backward()

    def _update(self, step: int) -> Tensor:
        self.guard.check()
        norm = get_total_norm([p.grad for p in self.masters if p.grad is not None], foreach=True)
        clip_grads_with_norm_(self.masters, self.clip, norm, foreach=True)
        # torch's fused AdamW reads ``found_inf`` on the device and changes nothing where it is 1
        # (the protocol of torch's GradScaler), so that the host need not wait for the norm.
        setattr(self.optimizer, "found_inf", self.guard.watch(norm, step))  # noqa: B010
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if not self.late:
            self.guard.check()
        return norm

    def confirm(self) -> None:
        self.guard.check()

    def state(self) -> EngineState:
        self.guard.check()
        return super().state()

    def _replicated(self) -> bool:
        return True

    def _set_weights(self, source: Source, kind: str, names: list[str]) -> None:
        """Do nothing: the weights are the masters."""


class _FiniteGuard:
    """Checks gradient norms without making the host wait for the GPU.

    A norm is copied to the host in the background and checked there at the next step. Meanwhile a
    flag on the device keeps gradients that are not finite from the weights.
    """

    def __init__(self, device: torch.device) -> None:
        self.norm = HostCopy(device)
        self.step: int | None = None

    def watch(self, norm: Tensor, step: int) -> Tensor:
        """Start copying a step's norm; return a flag on the device, 1.0 if it is not finite."""
        self.norm.start(norm)
        self.step = step
        return torch.logical_not(torch.isfinite(norm)).float()

    def check(self) -> None:
        """Raise NonFiniteError, once, when the last norm that was watched is not finite."""
        if self.step is None:
            return
        step, self.step = self.step, None
        raise_unless_finite(self.norm.read(), step)
