"""What the tests' child processes do: save and die in the middle, save as one of many ranks, train until killed.

A child is forked from a server that has imported everything once, so that it is there at once and ends as a real process
ends.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from r2id import dist
from r2id.checkpoints import writing
from r2id.checkpoints.files import Meta
from r2id.checkpoints.state import EngineState, Slice, whole
from r2id.config import load_config
from r2id.errors import WorkError
from r2id.training.loop import train

_SERVED = multiprocessing.get_context("forkserver")
_SERVED.set_forkserver_preload(["tests.training.children"])


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """A child process that does this work."""
    process = _SERVED.Process(target=work, args=arguments)
    process.start()
    return process


@contextmanager
def ended(process: Any) -> Iterator[Any]:
    """The process, killed at the end of the block if it is still there."""
    try:
        yield process
    finally:
        process.kill()
        process.join()


def state(step: int, rank: int = 0, ranks: int = 1) -> EngineState:
    """A rank's share of a small state: a weight in flat halves, a bias on the last rank, a buffer on the first."""

    def part(add: float) -> dict[str, Slice]:
        weight = torch.full((2, 3), float(step)) + add
        share = -(-6 // ranks)
        flat = weight.flatten()[rank * share : (rank + 1) * share]
        found = {"layer.weight": Slice(flat if ranks > 1 else weight, (2, 3), rank * share)}
        return found | (whole({"layer.bias": torch.arange(2.0) + add}) if rank == ranks - 1 else {})

    counts = whole({"counts": torch.ones(1)}) if rank == 0 else {}
    moments = {
        f"{moment}.{name}": value
        for moment, add in (("exp_avg", 2), ("exp_avg_sq", 3))
        for name, value in part(add).items()
    }
    return EngineState(
        {"model": part(0) | counts, "ema": part(1) | counts, "optimizer": moments}, step
    )


STATS = {"mean": torch.tensor([0.5]), "std": torch.tensor([2.0])}


def save(run: Path, step: int, keep: int = 2, milestone_every: int | None = None) -> Path:
    """A checkpoint of that small state, by as many ranks as there are."""
    meta = Meta(
        stage="riae",
        step=step,
        samples=step * 8,
        seed=7,
        config={"train": {"sizes": [[1, 2]], "lr": 1e-3}},
        model={"channels": 1},
    )
    return writing.save(
        run,
        state(step, dist.rank(), dist.world_size()),
        meta,
        keep=keep,
        milestone_every=milestone_every,
        stats=STATS,
    )


def save_and_die(run: Path, step: int, moment: int, before: bool) -> None:
    """Killed at its flush to disk number ``moment``, before or after that."""
    fsync, left = os.fsync, [moment]

    def fatal(descriptor: int) -> None:
        if not before:
            fsync(descriptor)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        if before:
            fsync(descriptor)

    os.fsync = fatal  # type: ignore[assignment]
    save(run, step, keep=1)


def save_as_rank(
    run: Path,
    rank: int,
    ranks: int,
    port: int,
    step: int,
    full: int | None = None,
    dying: int | None = None,
) -> None:
    """One of many ranks; on rank ``full`` no file may grow beyond 200 bytes, and rank ``dying`` is killed at its first
    file. Leaves RUN/said-RANK, what was said."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    dist.init()
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    try:
        if rank == dying:
            save_and_die(run, step, 0, before=True)
        said = str(save(run, step))
    except WorkError as error:
        said = f"WorkError: {error}"
    (run / f"said-{rank}").write_text(said[:190])
    dist.shutdown()


def train_until_killed(config: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    train(load_config(config, overrides))  # type: ignore[arg-type]
