"""Forward, backward and update, in one process by plain PyTorch or in many by DeepSpeed, behind one interface.

An engine trains a *stage module*: ``module(**batch)`` returns (scalar loss, dict of detached figures), and
``module.model`` holds the trained weights. Weights, gradients, moments and averages are float32 everywhere; bfloat16
is autocast of the forward pass. State goes in and out by the model's own parameter names, whole and on the CPU, so that
any engine goes on from any other's.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from r2id import dist
from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.dist import World
from r2id.errors import InputError, NonFiniteError
from r2id.training.ema import Ema
from r2id.training.shares import accumulation, deepspeed_config
from r2id.training.state import EngineState, Tensors, buffers, check_fits, to_cpu


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
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (others if parameter.ndim < 2 or id(parameter) in embeddings else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=optim.lr, betas=optim.betas,
                             fused=True)


def fill_moments(optimizer: torch.optim.Optimizer, tensors: Sequence[Tensor]) -> None:
    """Give every tensor its Adam state before the first step, so that a state can be loaded into it or saved."""
    for tensor in tensors:
        optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor), "exp_avg_sq": torch.zeros_like(tensor)}


def trained_model(module: nn.Module) -> nn.Module:
    """What a stage module trains."""
    model = module.model
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(module).__name__}.model: must be a module")
    return model


class LocalEngine(Engine):
    """Plain PyTorch in one process, on a CPU or a GPU. Needs neither compiler nor process group."""

    def __init__(self, module: nn.Module, optim: OptimConfig, train: TrainConfig, device: torch.device) -> None:
        self.device = device
        self.module = module.to(device).train()
        self.model = trained_model(module)
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
        setattr(self.optimizer, "found_inf", self.guard.watch(norm, step))  # noqa: B010
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
    """DeepSpeed's ZeRO at stages 0 to 3, for any number of processes.

    Every stage updates some float32 *masters*: the weights themselves (0), or this rank's flat share of them (1 to 3).
    Moments and averages are laid out alike, so all of them go in and out by way of the masters.
    """

    def __init__(self, module: nn.Module, optim: OptimConfig, train: TrainConfig, engine: EngineConfig,
                 world: World) -> None:
        deepspeed = _import_deepspeed(world)
        self.device, self.stage, self.clip = world.device, engine.zero_stage, optim.clip
        self.accumulation = accumulation(train, world.world_size)
        self.model = trained_model(module.to(world.device).train())
        self.names = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.names.items()}  # stage 3 empties the tensors
        self.optimizer = make_optimizer(self.model, optim)
        wrapped = _Autocast(module, world.device.type, train.precision == "bfloat16")
        settings = deepspeed_config(optim, train, engine, world.world_size, sum(p.numel() for p in self.names.values()))
        self.deepspeed, *_ = deepspeed.initialize(model=wrapped, optimizer=self.optimizer, config=settings)
        self.masters: list[Tensor] = self._find_masters()
        fill_moments(self.optimizer, self.masters)
        self.ema = Ema(self.masters, train.ema)
        self.steps = self.micro_steps = 0

    def _find_masters(self) -> list[Tensor]:
        if self.stage == 0:
            return list(self.names.values())
        zero = self.deepspeed.optimizer
        return list(zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        return self.deepspeed(**batch)

    def backward(self, loss: Tensor, accumulation: int) -> None:
        if accumulation != self.accumulation:
            raise ValueError(f"accumulation {accumulation}, and DeepSpeed was told {self.accumulation}")
        self.deepspeed.backward(loss)  # divides by the accumulation
        self.micro_steps += 1
        if self.micro_steps % accumulation:
            self.deepspeed.step()  # counts the micro-batch; it updates at the last one only

    def step(self, lr: float, step: int) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Stage 0 would apply a gradient that is not finite; the others skip the step and go on, for ever if it lasts.
        norm = self._clip(step) if self.stage == 0 else None
        self.deepspeed.step()
        if norm is None:
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device)
            if not self.deepspeed.was_step_applied():
                raise_unless_finite(math.inf, step)
        self.ema.update(step)
        self.steps = step + 1
        return norm

    def _clip(self, step: int) -> Tensor:
        """Stage 0, whose gradients are whole and averaged on every rank by now."""
        norm = get_total_norm([p.grad for p in self.masters if p.grad is not None], foreach=True)
        raise_unless_finite(float(norm), step)
        clip_grads_with_norm_(self.masters, self.clip, norm, foreach=True)
        return norm

    def state(self) -> EngineState | None:
        model = self._gather()
        first, second = (self._gather([self.optimizer.state[master][moment] for master in self.masters])
                         for moment in ("exp_avg", "exp_avg_sq"))
        ema = self.ema_state()
        if ema is None:
            return None
        return EngineState({**model, **to_cpu(buffers(self.model))}, ema, first, second, self.steps)

    def ema_state(self) -> Tensors | None:
        averages = self._gather(self.ema.averages)
        return {**averages, **to_cpu(buffers(self.model))} if dist.is_main() else None

    @torch.no_grad()
    def load_state(self, state: EngineState) -> None:
        check_fits(state, self.model, self.shapes)
        for moment, whole in (("exp_avg", state.exp_avg), ("exp_avg_sq", state.exp_avg_sq)):
            self._scatter(whole)
            for master in self.masters:
                self.optimizer.state[master][moment].copy_(master)
                self.optimizer.state[master]["step"].fill_(state.step)
        self._scatter(state.ema)
        torch._foreach_copy_(self.ema.averages, self.masters)
        self._scatter(state.model)
        self._set_weights(state.model)
        self.model.load_state_dict({name: state.model[name] for name in buffers(self.model)}, strict=False)
        self.steps = state.step

    @torch.no_grad()
    def _gather(self, values: list[Tensor] | None = None) -> Tensors:
        """Whole tensors by name, on rank 0's CPU, of values laid out as the masters; by default of the masters."""
        from deepspeed.utils import safe_get_full_fp32_param

        kept = None if values is None else [master.clone() for master in self.masters]
        if values is not None:
            torch._foreach_copy_(self.masters, values)
        whole: Tensors = {}
        for name, parameter in self.names.items():
            full = parameter if self.stage == 0 else safe_get_full_fp32_param(parameter)
            if dist.is_main():
                whole |= to_cpu({name: full.view(self.shapes[name])})
        if kept is not None:
            torch._foreach_copy_(self.masters, kept)
        return whole

    def _scatter(self, whole: Tensors) -> None:
        """Whole tensors by name, the same on every rank, into the masters."""
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self.names.items():
            value = whole[name].to(self.device)
            if self.stage == 0:
                parameter.copy_(value)
            elif self.stage < 3:
                safe_set_full_fp32_param(parameter, value)
            else:  # the twin for whole tensors fails where the elements do not divide by the ranks
                share = safe_get_local_fp32_param(parameter).numel()
                padded = F.pad(value.flatten(), (0, share * dist.world_size() - value.numel()))
                safe_set_local_fp32_param(parameter, padded[share * dist.rank():][:share])

    def _set_weights(self, whole: Tensors) -> None:
        """The weights that the forward pass uses, where they are not the masters."""
        if self.stage in (1, 2):
            for name, parameter in self.names.items():
                parameter.copy_(whole[name])
        elif self.stage == 3:
            from deepspeed.runtime.zero import GatheredParameters

            for name, parameter in self.names.items():
                with GatheredParameters([parameter], modifier_rank=0):
                    parameter.copy_(whole[name])


class _Autocast(nn.Module):
    """A module under autocast. DeepSpeed's own also reduces the gradients of linear layers in bfloat16."""

    def __init__(self, module: nn.Module, device_type: str, bfloat16: bool) -> None:
        super().__init__()
        self.module, self.device_type, self.enabled = module, device_type, bfloat16

    def forward(self, **batch: Any) -> tuple[Tensor, Tensors]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            return self.module(**batch)


def _import_deepspeed(world: World) -> Any:
    """DeepSpeed, on this job's device and process group, with its messages on stderr."""
    # DeepSpeed calls functions that newer versions of torch have renamed: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    dist.init_group(world)
    with redirect_stdout(sys.stderr):  # its logger keeps the stream that it finds at import
        import deepspeed
    # Shared memory serves its inference only, and would be compiled at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    return deepspeed
