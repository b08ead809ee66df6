"""Engines: forward, backward and update behind one interface, in one process or in many.

``LocalEngine`` is plain PyTorch in one process, ``DeepSpeedEngine`` is ZeRO in any number of
processes.
"""

from __future__ import annotations

from torch import nn

from r2id.config import EngineConfig, OptimConfig, TrainConfig
from r2id.dist import World
from r2id.errors import InputError
from r2id.training.engines.base import Engine
from r2id.training.engines.local import LocalEngine
from r2id.training.engines.settings import engine_kind

__all__ = ["Engine", "LocalEngine", "make_engine"]


def make_engine(
    module: nn.Module, *, optim: OptimConfig, train: TrainConfig, engine: EngineConfig, world: World
) -> Engine:
    """Make the engine that the config asks for.

    Raises InputError when that engine does not fit the number of processes.
    """
    if engine_kind(train, engine, world.world_size) == "deepspeed":
        if train.compile == "cuda_graphs":
            raise InputError(
                "train.compile = 'cuda_graphs': is for engine.kind 'local', in one process; use "
                "'auto'"
            )
        # Imported here, because it takes seconds and a run in one process does without DeepSpeed.
        from r2id.training.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, optim, train, engine, world)
    if world.world_size > 1:
        raise InputError(
            f"engine.kind = 'local': is for one process, and there are {world.world_size}; "
            "use 'deepspeed' or 'auto'"
        )
    return LocalEngine(module, optim, train, world.device)
