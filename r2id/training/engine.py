"""Forward, backward and update, in one process by plain PyTorch or in many by DeepSpeed, behind one interface.

An engine trains a *stage module*: ``module(**batch)`` returns (scalar loss, dict of detached figures), and
``module.model`` holds the trained weights. Weights, gradients, moments and averages are float32 everywhere; bfloat16
is autocast of the forward pass. State goes in and out by the model's own parameter names, whole and on the CPU, so that
any engine goes on from any other's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.dist import World
from r2id.errors import InputError, NonFiniteError
from r2id.training.ema import Ema

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


class Engine(ABC):
    """What the training loop knows of an engine. In a job of many processes every method is called by all of them."""

    device: torch.device

    @abstractmethod
    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        """One micro-batch, on the device → (loss, figures)."""

    @abstractmethod
    def backward(self, loss: Tensor, accumulation: int) -> None:
        """Add a micro-batch's share, loss / accumulation, to the step's gradients."""

    @abstractmethod
    def step(self, lr: float, step: int) -> Tensor:
        """Clip, update weights and average, after the last micro-batch of optimizer step ``step`` (from 0).

        Returns the gradient norm before clipping, a scalar on the device. A norm that is not finite never reaches the
        weights: NonFiniteError on every rank, here or, on a GPU in one process, at the next call.
        """

    @abstractmethod
    def state(self) -> EngineState | None:
        """The whole state on rank 0, None elsewhere."""

    @abstractmethod
    def ema_state(self) -> Tensors | None:
        """The averaged weights alone, on rank 0, None elsewhere."""

    @abstractmethod
    def load_state(self, state: EngineState) -> None:
        """Take over a state, the same on every rank. InputError when it is another model's."""


def micro_batch_size(train: TrainConfig, world_size: int) -> int:
    """Samples per forward pass of one process. InputError when the global batch does not divide evenly."""
    micro = train.micro_batch or max(1, train.batch // world_size)
    unit = micro * world_size
    if train.batch % unit:
        below, above = train.batch // unit * unit, (train.batch // unit + 1) * unit
        near = f"{below} or {above}" if below else f"{above}"
        raise InputError(f"train.batch = {train.batch}: must be a multiple of {unit}, {world_size} processes times "
                         f"micro-batches of {micro}; the nearest: {near}")
    return micro


def accumulation(train: TrainConfig, world_size: int) -> int:
    """Micro-batches of one process per optimizer step. InputError when the global batch does not divide evenly."""
    return train.batch // (world_size * micro_batch_size(train, world_size))


def make_engine(module: nn.Module, *, optim: OptimConfig, train: TrainConfig, engine: EngineConfig,
                world: World) -> Engine:
    """The engine that the config asks for. InputError when it does not fit the number of processes."""
    kind = engine.kind
    if kind == "auto":
        kind = "local" if world.world_size == 1 else "deepspeed"
    if kind == "deepspeed":
        return DeepSpeedEngine(module, optim, train, engine, world)
    if world.world_size > 1:
        raise InputError(f"engine.kind = 'local': is for one process, and there are {world.world_size}; "
                         "use 'deepspeed' or 'auto'")
    return LocalEngine(module, optim, train, world.device)


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) that decays matrices and leaves norms, biases and embeddings alone."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    decayed, others = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas,
                             fused=True)


def fill_moments(optimizer: torch.optim.Optimizer, tensors: list[Tensor]) -> None:
    """Give every tensor its Adam state before the first step, so that a state can be loaded into it or saved."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}


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


class LocalEngine(Engine):
    """Plain PyTorch in one process, on a CPU or a GPU. Needs neither compiler nor process group."""

    def __init__(self, module: nn.Module, optim: OptimConfig, train: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.module = module.to(device).train()
        self.model: nn.Module = module.model
        self.clip, self.bfloat16 = optim.clip, train.precision == "bfloat16"
        self.optimizer = make_optimizer(self.model, optim)
        self.names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = list(self.names.values())
        fill_moments(self.optimizer, self.parameters)
        self.ema = Ema(self.parameters, train.ema)
        self.guard = _FiniteGuard(device)
        self.steps = 0

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.module(**batch)

    def backward(self, loss: Tensor, accumulation: int) -> None:
        (loss / accumulation).backward()

    def step(self, lr: float, step: int) -> Tensor:
        self.guard.check()
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
        clip_grads_with_norm_(self.parameters, self.clip, norm, foreach=True)
        # The fused update reads this on the device and does nothing where it is 1: the protocol of torch's GradScaler.
        self.optimizer.found_inf = self.guard.watch(norm, step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cpu":  # nothing runs behind: no reason to wait for the next call
            self.guard.check()
        self.ema.update(step)
        self.steps = step + 1
        return norm

    def state(self) -> EngineState:
        self.guard.check()
        moments = {name: self.optimizer.state[p] for name, p in self.names.items()}
        return EngineState(
            model=to_cpu(self.model.state_dict()), ema=self.ema_state(),
            exp_avg=to_cpu({name: moment["exp_avg"] for name, moment in moments.items()}),
            exp_avg_sq=to_cpu({name: moment["exp_avg_sq"] for name, moment in moments.items()}), step=self.steps)

    def ema_state(self) -> Tensors:
        averages = dict(zip(self.names, self.ema.averages, strict=True))
        return to_cpu({**self.model.state_dict(), **averages})

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        check_fits(state, self.model, {name: p.shape for name, p in self.names.items()})
        self.model.load_state_dict(state.model)
        for (name, parameter), average in zip(self.names.items(), self.ema.averages, strict=True):
            average.copy_(state.ema[name])
            moments = self.optimizer.state[parameter]
            moments["exp_avg"].copy_(state.exp_avg[name])
            moments["exp_avg_sq"].copy_(state.exp_avg_sq[name])
            moments["step"].fill_(state.step)
        self.steps = state.step


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
        raise_unless_finite(float(self.norm), self.step)
        self.step = None


def raise_unless_finite(norm: float, step: int) -> None:
    if not math.isfinite(norm):
        raise NonFiniteError(f"step {step}: the gradient norm is {norm}; stopped before the update, the last "
                             "checkpoint is good; a lower optim.lr or train.precision = 'float32' may help")


class DeepSpeedEngine(Engine):
    pass
