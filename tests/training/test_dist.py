"""Ranks and collectives in a process started alone; two processes are in test_engine_ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from r2id import dist
from r2id.config import TrainConfig
from r2id.errors import InputError


def test_alone_every_collective_is_the_identity() -> None:
    tensor = torch.tensor([1.0, 2.0])
    dist.barrier()
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    assert torch.equal(dist.all_reduce_sum(tensor), tensor)
    assert dist.broadcast_object("x") == "x"
    dist.shutdown()


def test_init_alone_joins_nothing() -> None:
    world = dist.init()
    assert (world.rank, world.world_size, world.local_rank) == (0, 1, 0)
    assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ("WORLD_SIZE=4", "WORLD_SIZE = 4, but no RANK, MASTER_ADDR, MASTER_PORT set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=1", "no MASTER_ADDR set"),
        ("WORLD_SIZE=abc", "WORLD_SIZE = 'abc': must be a number"),
        ("LOCAL_RANK=-1", "LOCAL_RANK = '-1': must be a number"),
        ("RANK=1", "RANK = 1: must be below WORLD_SIZE = 1"),
    ],
)
def test_variables_that_describe_no_job(
    variables: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in variables.split():
        monkeypatch.setenv(*variable.split("="))
    with pytest.raises(InputError, match=message):
        dist.init()
    assert not torch.distributed.is_initialized()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(InputError, match=f"LOCAL_RANK = {torch.cuda.device_count()}"):
        dist.init()


def test_nccl_is_told_its_gpu_and_waits_longer_than_its_ten_minutes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What torch is asked for; nothing is joined, for there may be no GPU here."""
    asked: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **settings: asked.append((backend, settings)),
    )
    gpu = torch.device("cuda", 3)
    dist.init_group(dist.World(0, 1, 3, gpu))
    dist.init_group(dist.World(0, 1, 0, torch.device("cpu")))
    (nccl, of_nccl), (gloo, of_gloo) = asked
    assert (nccl, gloo) == ("nccl", "gloo") and of_nccl["device_id"] == gpu
    assert "device_id" not in of_gloo
    stall = TrainConfig(steps=1).stall_seconds
    assert stall and of_nccl["timeout"].total_seconds() > stall, "the watchdog speaks first"
