"""Training in any number of processes with DeepSpeed's ZeRO.

Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv:1910.02054.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from contextlib import redirect_stdout
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from r2id import dist
from r2id.checkpoints.state import Piece, Source, Tensors, whole_layout
from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.config.batch_split import accumulation
from r2id.dist import World
from r2id.errors import InputError
from r2id.training.engines.base import (
    Engine,
    make_optimizer,
    raise_unless_finite,
    trained_model,
    trained_parameters,
)
from r2id.training.engines.settings import deepspeed_config


class DeepSpeedEngine(Engine):
    """DeepSpeed's ZeRO at stages 0 to 3, for any number of processes.

    Its masters are the weights themselves (stage 0), or this rank's flat share of them (1 to 3).
    They are float32 even where the forward pass uses bfloat16 weights (2 and 3).
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        train: TrainConfig,
        engine: EngineConfig,
        world: World,
    ) -> None:
        deepspeed = _import_deepspeed(world)
        self.device, self.stage, self.clip = world.device, engine.zero_stage, optim.clip
        self.accumulation = accumulation(train, world.world_size)
        self.model = trained_model(module.to(world.device).train())
        self.names = trained_parameters(module)
        # Noted now, because stage 3 empties the tensors.
        self.shapes = {name: tuple(p.shape) for name, p in self.names.items()}
        self.optimizer = make_optimizer(module, optim)
        exact: Tensors = {}
        if train.precision == "bfloat16_weights":
            exact = {name: p.detach().to("cpu", copy=True) for name, p in self.names.items()}
        elements = sum(p.numel() for p in self.names.values())
        config = deepspeed_config(optim, train, engine, world.world_size, elements)
        try:
            self.deepspeed, *_ = deepspeed.initialize(
                model=_Autocast(module, world.device.type, train.autocast),
                optimizer=self.optimizer,
                config=config,
            )
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(
                f"engine.deepspeed: {name} = {first['input']!r}: DeepSpeed says: {first['msg']}"
            ) from None
        self.masters = self._find_masters()
        self.layout = self._find_layout()
        if exact:  # DeepSpeed has made its masters from weights that it had rounded to bfloat16
            for piece in self.layout:
                values = exact[piece.name].flatten()[piece.start : piece.start + piece.count]
                piece.of(self.masters).detach().copy_(values)
        self.micro_steps = 0
        self._track_masters(module, train)

    def _find_masters(self) -> list[Tensor]:
        """Find the float32 tensors that DeepSpeed updates on this rank."""
        if self.stage == 0:
            return list(self.names.values())
        zero = self.deepspeed.optimizer
        return list(
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def _find_layout(self) -> list[Piece]:
        """Find where this rank's share of each parameter is in its masters, if it has one."""
        if self.stage == 0:
            return whole_layout(self.shapes)
        find = self._partition_piece if self.stage == 3 else self._group_piece
        pieces = [find(name, parameter) for name, parameter in self.names.items()]
        return [piece for piece in pieces if piece.count > 0]

    def _partition_piece(self, name: str, parameter: Tensor) -> Piece:
        """Find a parameter's piece at stage 3, where ranks share each parameter equally.

        The last shares may be shorter or empty.
        """
        zero, size = self.deepspeed.optimizer, math.prod(self.shapes[name])
        master, offset, share = zero.grad_position[zero.get_param_id(parameter)]
        start, end = share * dist.rank(), min(share * (dist.rank() + 1), size)
        return Piece(name, start, end - start, master, offset)

    def _group_piece(self, name: str, parameter: Tensor) -> Piece:
        """Find a parameter's piece at stages 1 and 2, where ranks share flat tensors of parameters.

        There is one flat tensor for each group of the optimizer's parameters. The place in it is
        found by addresses, because DeepSpeed's own table of fragments is wrong when its
        ``round_robin_gradients`` is on.
        """
        groups, address = self.deepspeed.optimizer.bit16_groups_flat, parameter.data_ptr()
        master = next(
            number
            for number, flat in enumerate(groups)
            if 0 <= address - flat.data_ptr() < flat.nbytes
        )
        offset = (address - groups[master].data_ptr()) // parameter.element_size()
        share = self.masters[master].numel()
        # This rank's share of the flat tensor begins at this element of the parameter; before it
        # where the number is negative.
        first = share * dist.rank() - offset
        start, end = max(0, first), min(parameter.numel(), first + share)
        return Piece(name, start, end - start, master, start - first)

    def _replicated(self) -> bool:
        return self.stage == 0

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, Tensors]:
        return self.deepspeed(**batch)

    def backward(self, loss: Tensor, accumulation: int) -> None:
        if accumulation != self.accumulation:
            raise ValueError(
                f"accumulation = {accumulation}: must be {self.accumulation}, for which "
                "DeepSpeed was configured"
            )
        self.deepspeed.backward(loss)  # divides by the accumulation
        self.micro_steps += 1
        if self.micro_steps % accumulation:
            self.deepspeed.step()  # counts the micro-batch; it updates at the last one only

    def _update(self, step: int) -> Tensor:
        # At stage 0 DeepSpeed would apply a gradient that is not finite, so that it is checked
        # before. At the other stages it skips the step by itself, without an error.
        norm = self._clip(step) if self.stage == 0 else None
        self.deepspeed.step()
        if norm is None:
            norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device)
            if not self.deepspeed.was_step_applied():
                raise_unless_finite(math.inf, step)
        return norm

    def _clip(self, step: int) -> Tensor:
        """Clip the gradients at stage 0, where every rank has them whole and averaged by now."""
        norm = get_total_norm([p.grad for p in self.masters if p.grad is not None], foreach=True)
        found = float(norm)  # waits for the device
        if not math.isfinite(found):
            self.optimizer.zero_grad(set_to_none=True)
            self.deepspeed.micro_steps += 1  # its own step, which is not called now, would count
        raise_unless_finite(found, step)
        clip_grads_with_norm_(self.masters, self.clip, norm, foreach=True)
        return norm

    def _set_weights(self, source: Source, kind: str, names: list[str]) -> None:
        if self.stage in (1, 2):
            for name in names:
                self.names[name].copy_(source.read(kind, name).view(self.shapes[name]))
        elif self.stage == 3:
            from deepspeed.runtime.zero import GatheredParameters

            for name in names:
                parameter = self.names[name]
                with GatheredParameters([parameter], modifier_rank=0):
                    if dist.is_main():
                        parameter.copy_(source.read(kind, name).view(self.shapes[name]))


class _Autocast(nn.Module):
    """Runs a module under autocast.

    DeepSpeed's own autocast is not used, because it also reduces the gradients of linear layers in
    bfloat16.
    """

    def __init__(self, module: nn.Module, device_type: str, bfloat16: bool) -> None:
        super().__init__()
        self.module, self.device_type, self.enabled = module, device_type, bfloat16

    def forward(self, **batch: Any) -> tuple[Tensor, Tensors]:
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.enabled):
            return self.module(**batch)


def _import_deepspeed(world: World) -> Any:
    """Import DeepSpeed and have it use this job's device and process group."""
    # DeepSpeed calls functions that newer versions of torch have renamed; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    dist.init_group(world)
    # Its logger writes to the stdout that it finds at import, and stdout is for results.
    with redirect_stdout(sys.stderr):
        import deepspeed
    # This extension serves inference only, and would be compiled at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        "nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False
    )
    return deepspeed
