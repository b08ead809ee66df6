"""Forward, backward and update, in one process by plain PyTorch or in many by DeepSpeed, behind one interface.

An engine trains a *stage module*: ``module(**batch)`` returns (scalar loss, dict of detached figures), and
``module.model`` holds the trained weights. What is updated, moments and averages are float32 everywhere; bfloat16 is
autocast of the forward pass. State goes in and out by the model's own parameter names, each rank's share by itself, so
that any engine at any number of ranks goes on from any other's and none gathers the whole.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from r2id import dist
from r2id.checkpoints.state import (
    MOMENTS,
    EngineState,
    Piece,
    Shape,
    Slices,
    Source,
    Tensors,
    buffers,
    check_fits,
    cut,
    fill,
    whole,
    whole_layout,
)
from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.dist import World
from r2id.errors import InputError, NonFiniteError
from r2id.training.batch_split import engine_kind
from r2id.training.ema import Ema, decays


class Engine(ABC):
    """What the training loop knows of an engine. In a job of many processes every method is called by all of them.

    An engine updates float32 *masters*: the weights themselves, or flat shares of them. Moments and averages are laid out
    alike, so that one list of pieces tells where each parameter's elements are in all of them.
    """

    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    shapes: dict[str, Shape]
    """Of the trained parameters, by name."""
    masters: list[Tensor]
    layout: list[Piece]
    """What of the parameters this rank's masters hold."""
    ema: Ema
    steps: int = 0

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        """One micro-batch, on the device → (loss, figures)."""

    @abstractmethod
    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add a micro-batch's share, loss / accumulation, to the step's gradients."""

    @abstractmethod
    def step(self, lr: float, step: int) -> Tensor:
        """Clip, update weights and averages, after the last micro-batch of optimizer step ``step`` (from 0).

        Returns the gradient norm before clipping, a scalar on the device. A norm that is not finite never reaches the
        weights: NonFiniteError on every rank, here or, on a GPU in one process, at the next call, before that does
        anything. The engine is good for more steps afterwards.
        """

    def state(self) -> EngineState:
        """This rank's share of the state: the very tensors that the next step changes, so save it before that."""
        parts: dict[str, Slices] = {}
        for kind, prefix, values in self._tracked():
            parts.setdefault(kind, {}).update(cut(values, self._own(), self.shapes, prefix))
        if dist.is_main():
            for kind in ("model", *self.ema.averages):
                parts[kind].update(whole(buffers(self.model)))
        return EngineState(parts, self.steps)

    def check(self, source: Source) -> None:
        """InputError when a state is another model's, or of other averages."""
        kinds = {"optimizer": tuple(f"{moment}." for moment in MOMENTS), "model": ("",)}
        check_fits(source, kinds | dict.fromkeys(self.ema.averages, ("",)), self.shapes, self.model)

    @torch.no_grad()
    def load(self, source: Source) -> None:
        """Take over a state that fits; each rank reads what it holds."""
        for kind, prefix, values in self._tracked():
            fill(values, self.layout, source, kind, prefix)
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(source.step)
        self._set_weights(source)
        shapes = source.shapes("model")
        self.model.load_state_dict(
            {name: source.read("model", name).view(shapes[name]) for name in buffers(self.model)},
            strict=False,
        )
        self.steps = source.step

    @torch.no_grad()
    def ema_state(self) -> Tensors | None:
        """The averaged weights that sampling uses, whole, with the model's buffers: on rank 0's CPU, None elsewhere."""
        pieces = {piece.name: piece for piece in self.layout}
        averages: Tensors = {}
        for name, shape in self.shapes.items():
            full = torch.zeros(math.prod(shape), device=self.device)
            if name in pieces:
                piece = pieces[name]
                full[piece.start : piece.start + piece.count] = piece.of(self.ema.averages["ema"])
            full = full if self._replicated() else dist.all_reduce_sum(full)
            if dist.is_main():
                averages[name] = full.view(shape).cpu()
        return {**averages, **buffers(self.model)} if dist.is_main() else None

    def _tracked(self) -> list[tuple[str, str, list[Tensor]]]:
        """All that is saved: (kind, prefix of the names, tensors laid out as the masters)."""
        moments = [
            (
                "optimizer",
                f"{moment}.",
                [self.optimizer.state[master][moment] for master in self.masters],
            )
            for moment in MOMENTS
        ]
        return [
            ("model", "", self.masters),
            *moments,
            *((kind, "", averages) for kind, averages in self.ema.averages.items()),
        ]

    def _own(self) -> list[Piece]:
        """The pieces that this rank saves: each parameter's elements are saved once."""
        return self.layout[dist.rank() :: dist.world_size()] if self._replicated() else self.layout

    @abstractmethod
    def _replicated(self) -> bool:
        """Whether every rank holds everything."""

    @abstractmethod
    def _set_weights(self, source: Source) -> None:
        """The weights that the forward pass uses, where they are not the masters."""


def make_engine(
    module: nn.Module, *, optim: OptimConfig, train: TrainConfig, engine: EngineConfig, world: World
) -> Engine:
    """The engine that the config asks for. InputError when it does not fit the number of processes."""
    if engine_kind(train, engine, world.world_size) == "deepspeed":
        from r2id.training.zero import DeepSpeedEngine

        return DeepSpeedEngine(module, optim, train, engine, world)
    if world.world_size > 1:
        raise InputError(
            f"engine.kind = 'local': is for one process, and there are {world.world_size}; "
            "use 'deepspeed' or 'auto'"
        )
    return LocalEngine(module, optim, train, world.device)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and leaves norms, biases and embeddings alone."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(
                parameter
            )
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas, fused=True
    )


def fill_moments(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give every tensor its Adam state before the first step, so that a state can be loaded into it or saved."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
        }


def trained_model(module: nn.Module) -> nn.Module:
    """What a stage module trains."""
    model = module.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(module).__name__}.model: must be a module")
    return model


class LocalEngine(Engine):
    """Plain PyTorch in one process, on a CPU or a GPU. Needs neither compiler nor process group."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, train: TrainConfig, device: torch.device
    ) -> None:
        self.device = device
        self.module = module.to(device).train()
        self.model = trained_model(module)
        self.clip, self.bfloat16 = optim.clip, train.autocast
        self.optimizer = make_optimizer(self.model, optim)
        self.names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {name: tuple(p.shape) for name, p in self.names.items()}
        self.masters = list(self.names.values())
        self.layout = whole_layout(self.shapes)
        fill_moments(self.optimizer, self.masters)
        self.ema = Ema(self.masters, decays(train))
        self.guard = _FiniteGuard(device)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.module(**batch)

    def backward(self, loss: Tensor, accumulation: int) -> None:
        (loss / accumulation).backward()

    def step(self, lr: float, step: int) -> Tensor:
        self.guard.check()
        norm = get_total_norm([p.grad for p in self.masters if p.grad is not None], foreach=True)
        clip_grads_with_norm_(self.masters, self.clip, norm, foreach=True)
        # The fused update reads this on the device and does nothing where it is 1: the protocol of torch's GradScaler.
        setattr(self.optimizer, "found_inf", self.guard.watch(norm, step))  # noqa: B010
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps = step + 1
        if self.device.type == "cpu":  # nothing runs behind: no reason to wait for the next call
            self.guard.check()
        self.ema.update(step)
        return norm

    def state(self) -> EngineState:
        self.guard.check()
        return super().state()

    def _replicated(self) -> bool:
        return True

    def _set_weights(self, source: Source) -> None:
        """They are the masters."""


class _FiniteGuard:
    """Watches gradient norms without making the host wait for the GPU: a norm is copied to the host while later work
    is queued, and read at the next step. Until then the flag on the device keeps it from the weights."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.norm = torch.zeros((), pin_memory=self.cuda)
        self.copied = torch.cuda.Event() if self.cuda else None
        self.step: int | None = None

    def watch(self, norm: Tensor, step: int) -> Tensor:
        """Note the norm; a float flag on the device, 1 where it is not finite."""
        self.norm.copy_(norm, non_blocking=True)
        self.step = step
        if self.copied is not None:
            self.copied.record()
        return torch.logical_not(torch.isfinite(norm)).float()

    def check(self) -> None:
        """Raise NonFiniteError when the norm noted last is not finite."""
        if self.step is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        step, self.step = self.step, None
        raise_unless_finite(float(self.norm), step)


def raise_unless_finite(norm: float, step: int) -> None:
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"step {step}: the gradient norm is {norm}; stopped before the update, the last "
            "checkpoint is good; a lower optim.lr or train.precision = 'float32' may help",
            step,
        )
