"""Rank, world size and device of this process, and the few collectives that the library needs.

Every function works in a process started alone, where there is no process group. In a job started
by torchrun, or by anything else that sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, init() joins the group.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as group
from torch import Tensor

from r2id import files
from r2id.errors import InputError, WorkError
from r2id.progress import say

Wait = Callable[[], Any]

_PATIENCE = timedelta(hours=1)
"""How long a rank waits for another in a collective. NCCL's ten minutes are too few for what one
rank does alone, such as a principal component analysis; a rank that is stuck is found by the
watchdog before (``train.stall_seconds``), and one that died by the launcher."""


@dataclass(frozen=True)
class World:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    """Index of this process on its host, and of its GPU."""
    device: torch.device


def init() -> World:
    """Join the job that the environment describes; a process alone is rank 0 of 1.

    Uses NCCL on CUDA and gloo on a CPU. May be called again. Raises InputError when the environment
    describes no job, and when a host has more processes than GPUs.
    """
    number, size, local = (
        _described("RANK", 0),
        _described("WORLD_SIZE", 1),
        _described("LOCAL_RANK", 0),
    )
    if number >= size:
        raise InputError(f"RANK = {number}: must be below WORLD_SIZE = {size}; {_ALONE}")
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT") if size > 1 else ()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise InputError(f"WORLD_SIZE = {size}, but no {', '.join(missing)} set; {_ALONE}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise InputError(
                f"LOCAL_RANK = {local}: this host has {torch.cuda.device_count()} GPUs; "
                "start at most one process per GPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
        allow_tf32(device)
    if size > 1:
        if number == 0 and not group.is_initialized():
            say(f"waiting for {size} processes")
        _join(device)
    return World(number, size, local, device)


_ALONE = "start several processes by torchrun, and one without RANK and WORLD_SIZE"


def _described(name: str, alone: int) -> int:
    """Read a launcher's variable; ``alone`` is what holds for a process that has none."""
    value = os.environ.get(name) or str(alone)
    if not value.isdecimal():
        raise InputError(f"{name} = {value!r}: must be a number; {_ALONE}")
    return int(value)


def find_device(name: torch.device | str) -> torch.device:
    """Find a device; "auto" is CUDA if there is a GPU. Raises InputError if it is not usable."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device '{name}': not usable here: {str(error).splitlines()[0]}"
        ) from None
    allow_tf32(device)
    return device


def allow_tf32(device: torch.device) -> None:
    """Have a GPU multiply float32 matrices in TF32, several times as fast, where one is used.

    TF32 has float32's range and three more bits of mantissa than bfloat16. What is added up, and
    what the GPU does beside matrix products, stays float32. A CPU's products stay as they are.
    """
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True


def init_group(world: World) -> None:
    """Make a process group for a process that is alone too, as DeepSpeed needs one."""
    if world.world_size == 1 and not group.is_initialized():
        _join(world.device, store=group.HashStore(), rank=0, world_size=1)


def _join(device: torch.device, **place: Any) -> None:
    if not group.is_initialized():
        if device.type == "cuda":
            # NCCL would guess the GPU from the rank, which is wrong on hosts of unlike many GPUs.
            group.init_process_group("nccl", device_id=device, timeout=_PATIENCE, **place)
        else:
            group.init_process_group("gloo", timeout=_PATIENCE, **place)
        if device.type == "cpu":
            atexit.register(shutdown)  # gloo's threads must end before the interpreter does


def rank() -> int:
    """This process's number in the job, from 0."""
    return group.get_rank() if group.is_initialized() else 0


def world_size() -> int:
    """Number of processes of the job."""
    return group.get_world_size() if group.is_initialized() else 1


def is_main() -> bool:
    """True in the one process that writes files, logs and draws samples."""
    return rank() == 0


def barrier() -> None:
    """Wait until every process has reached this call."""
    if world_size() > 1:
        group.barrier()


def broadcast_object(value: Any) -> Any:
    """Return rank 0's value on every rank. It is pickled, so it must come from this job only."""
    if world_size() == 1:
        return value
    box = [value]
    group.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: Any) -> list[Any]:
    """Return every rank's value, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    group.all_gather_object(values, value)
    return values


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Have this job be the only one that works in a folder, within this block; see files.exclusive.

    Every rank calls it, and all get the same error.
    """
    with ExitStack() as stack:
        failure: Exception | None = None
        if is_main():
            try:
                stack.enter_context(files.exclusive(folder))
            except (InputError, WorkError) as error:
                failure = error
        failure = broadcast_object(failure)
        if failure is not None:
            raise failure
        yield


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all ranks; the argument stays as it is."""
    if world_size() == 1:
        return tensor
    reduced = tensor.clone()
    group.all_reduce(reduced, group.ReduceOp.SUM)
    return reduced


def start_all_reduce_max(tensor: Tensor) -> Wait:
    """Start replacing a tensor by its elementwise maximum over all ranks; return how to wait.

    Waiting makes the host wait with gloo, and the GPU's current stream with NCCL.
    """
    work = group.all_reduce(tensor, group.ReduceOp.MAX, async_op=True)
    return work.wait


def shutdown() -> None:
    """Leave the process group, if any. On CPUs a process does so by itself when it ends."""
    if group.is_initialized():
        gloo = group.get_backend() == "gloo"
        group.destroy_process_group()
        if gloo:
            # Gloo's threads may still hold tensors of the last collectives. If they free them after
            # the interpreter is gone, the process aborts (pytorch/pytorch#179291). Sleeping gives
            # up Python's lock, which they need to free them now.
            time.sleep(0.2)
