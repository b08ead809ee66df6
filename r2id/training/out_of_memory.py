"""What to change when a GPU's memory runs out in training, with numbers from the plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psutil
import torch

from r2id.config import R2idRun, RiaeRun
from r2id.config.batch_split import micro_batch_size
from r2id.dist import World
from r2id.errors import InputError, WorkError
from r2id.training.planner import (
    RUNTIME,
    find_dimensions,
    largest_micro_batch,
    memory,
    records_several,
)
from r2id.training.workload import Dimensions, Workload

Run = RiaeRun | R2idRun

_CPU_SAYS = "can't allocate memory"
"""What tells a RuntimeError of torch's for memory of a CPU; a GPU's has a type of its own."""


@contextmanager
def advise_on_out_of_memory(config: Run, world: World) -> Iterator[None]:
    """Within this block, have torch's errors that a setting can mend name that setting.

    Raises WorkError for memory that runs out, and for what ``train.deterministic`` does not allow.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or _CPU_SAYS in str(error):
            total = memory_of(world.device)
            try:
                dimensions = find_dimensions(config)
                if world.device.type != "cuda":
                    dimensions = replace(dimensions, shapes=1)  # no steps are recorded
                advice = advise(config, dimensions, world.world_size, total)
            except InputError:  # shards or codec are gone by now
                advice = "a smaller train.micro_batch needs less"
            raise WorkError(f"out of memory, {total / 1e9:.1f} GB in all: {advice}") from None
        if not (config.train.deterministic and "deterministic implementation" in str(error)):
            raise
        reason = str(error).splitlines()[0]
        raise WorkError(f"train.deterministic = true: not possible here: {reason}") from None


def memory_of(device: torch.device) -> int:
    """Return all bytes of a device's memory, whoever uses them."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return psutil.virtual_memory().total


def advise(config: Run, dimensions: Dimensions, gpus: int, limit: int) -> str:
    """Say what a run is planned to take, and which settings are planned to fit into ``limit``."""

    def needs(run: Run) -> int:
        return memory(Workload(run, dimensions), gpus)["total"] + RUNTIME

    planned = needs(config)
    ways = []
    for name, run in _thriftier(config, dimensions, gpus, limit):
        need = needs(run)
        if need <= min(limit, planned):
            ways.append(f"{name} ({need / 1e9:.2f} GB)")
    says = f"r2id plan says {planned / 1e9:.2f} GB with micro-batches of "
    says += f"{micro_batch_size(config.train, gpus)}"
    if planned <= limit:
        says += ", so that others may hold the rest"
    if ways:
        return f"{says}; these fit: {', '.join(ways)}"
    return f"{says}; it takes more GPUs, larger ones, or engine.offload"


def _thriftier(
    config: Run, dimensions: Dimensions, gpus: int, limit: int
) -> Iterator[tuple[str, Run]]:
    """Yield settings that need less memory, with the config that has them."""
    train, engine = config.train, config.engine
    current, share = micro_batch_size(train, gpus), train.batch // gpus
    smaller = max((size for size in range(1, current) if share % size == 0), default=0)
    size = min(smaller, largest_micro_batch(config, dimensions, gpus, limit) or 0)
    if size:
        yield f"train.micro_batch={size}", _with(config, "train", micro_batch=size)
    if records_several(Workload(config, dimensions), gpus):
        yield "train.compile=true", _with(config, "train", compile=True)
    if train.activation_checkpointing != "all":
        yield (
            'train.activation_checkpointing="all"',
            _with(config, "train", activation_checkpointing="all"),
        )
    for stage in range(engine.zero_stage + 1, 4) if gpus > 1 else ():
        yield f"engine.zero_stage={stage}", _with(config, "engine", zero_stage=stage)


def _with(config: Run, section: str, **values: Any) -> Run:
    changed = getattr(config, section).model_copy(update=values)
    return config.model_copy(update={section: changed})
