"""What the tests' child processes do: save and die in the middle, work as ranks of one job, train
until killed.

A child is forked from a server that has imported everything once, so that it is there at once and
ends as a real process ends.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from r2id import cli, dist
from r2id.checkpoints import writing
from r2id.checkpoints.files import Meta
from r2id.checkpoints.state import EngineState, Slice, whole
from r2id.config import load_config
from r2id.errors import WorkError
from r2id.training import loop
from r2id.training.loop import train
from r2id.training.state import TrainState
from r2id.training.tasks import Batch
from tests.forked import FORKED
from tests.waiting import free_port


def start(work: Callable[..., None], *arguments: Any) -> Any:
    """A child process that does this work."""
    process = FORKED.Process(target=work, args=arguments)
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


def _join_job(rank: int, ranks: int, port: int) -> dist.World:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return dist.init()


class Ranks:
    """Ranks of one job, each a process, that stay to do together whatever they are told.

    ``ranks(work, …)`` calls ``work(world, …)`` on every rank and returns what each returned. Where
    one fails, the job is killed, AssertionError says why, and the next call starts another job.
    What the ranks write to stdout is in ``output``.
    """

    def __init__(self, count: int, output: Path) -> None:
        self.count, self.output = count, output
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def __call__(
        self, work: Callable[..., Any], *arguments: Any, seconds: float = 1800
    ) -> list[Any]:
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((work, arguments))
        answers: dict[Any, Any] = {}
        end = time.monotonic() + seconds
        while waiting := [pipe for pipe in self.pipes if pipe not in answers]:
            ready = wait(waiting, max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise AssertionError(f"{work.__name__}: no answer within {seconds} seconds")
            for pipe in ready:
                try:
                    done, answers[pipe] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    done, answers[pipe] = False, "the process has ended"
                if not done:
                    rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                    self.close()
                    raise AssertionError(f"rank {rank}: {answers[pipe]}")
        return [answers[pipe] for pipe in self.pipes]

    def _start(self) -> None:
        port = free_port()
        for rank in range(self.count):
            ours, theirs = FORKED.Pipe()
            self.processes.append(start(_serve, theirs, rank, self.count, port, self.output))
            self.pipes.append(ours)
            theirs.close()

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes = [], []


def _serve(pipe: Connection, rank: int, ranks: int, port: int, output: Path) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    world = _join_job(rank, ranks, port)
    while True:
        work, arguments = pipe.recv()
        try:
            pipe.send((True, work(world, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def state(step: int, rank: int = 0, ranks: int = 1) -> EngineState:
    """A rank's share of a small state.

    The weight is in flat halves, the bias on the last rank, the buffer on the first.
    """

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
    milestones = {"milestone_every": milestone_every} if milestone_every else {}
    meta = Meta(
        stage="riae",
        step=step,
        samples=step * 8,
        seed=7,
        config={"train": {"sizes": [[1, 2]], "lr": 1e-3, **milestones}},
        model={"channels": 1},
    )
    return writing.save(
        run, state(step, dist.rank(), dist.world_size()), meta, keep=keep, stats=STATS
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
    """Save as one of many ranks, and write what that said to RUN/said-RANK.

    On rank ``full`` no file may grow beyond 200 bytes; rank ``dying`` is killed at its first file.
    """
    _join_job(rank, ranks, port)
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


def command(_world: dist.World | None, *arguments: Any) -> int:
    """Run the r2id command with these arguments in this process; its exit code."""
    sys.argv, code = ["r2id", *map(str, arguments)], 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    sys.stdout.flush()
    return code


def command_apart(said: Path, *arguments: Any) -> None:
    """Run the r2id command as a process of its own would; its words go to the file ``said``."""
    torch.set_num_threads(1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(command(None, *arguments))


def train_as_rank(
    rank: int, ranks: int, port: int, folder: Path, ending: str, *arguments: Any
) -> None:
    """Train by the command as one of many ranks, whose group is left together, as NCCL's is.

    In the second step the last rank raises an error (``ending`` "failed"), or every one gets two
    signals ("stopped"). A rank's words go to FOLDER/said-RANK; FOLDER/left-RANK is there from when
    it begins to leave the group.
    """
    os.dup2(os.open(folder / f"said-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    _join_job(rank, ranks, port)
    destroy, make_step = torch.distributed.destroy_process_group, loop.step_or_skip

    def destroy_together() -> None:
        (folder / f"left-{rank}").touch()
        while len(list(folder.glob("left-*"))) < ranks:
            time.sleep(0.01)
        destroy()

    def step_or_end(state: TrainState, previous: list[Batch]) -> None:
        if state.step == 1 and ending == "failed":
            if rank == ranks - 1:
                raise WorkError("this rank has no disk any more")
            dist.barrier()  # to which that rank never comes
        if state.step == 1 and ending == "stopped":
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        make_step(state, previous)

    torch.distributed.destroy_process_group = destroy_together  # type: ignore[assignment]
    loop.step_or_skip = step_or_end
    sys.exit(command(None, "train", *arguments))


def torchrun(said: Path, *arguments: Any) -> None:
    """Do what ``python -m r2id.torchrun`` with these arguments does; what it says goes to the file
    ``said``.
    """
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
    sys.argv = ["torchrun", *map(str, arguments)]
    runpy.run_module("r2id.torchrun", run_name="__main__")


def train_until_killed(config: Path, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    train(load_config(config, overrides))  # type: ignore[arg-type]
