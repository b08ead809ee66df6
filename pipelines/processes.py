"""The number of processes of a stage: NPROC, or else one per GPU.

``python -m pipelines.processes CONFIG [section.key=value …]`` prints that of a training, for
launch/train.sh, whose arguments may hold options of ``r2id train`` too.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from pipelines.gpu_count import gpu_count
from r2id.config import PipelineRun, TrainConfig, load_config
from r2id.config.batch_split import micro_batch_size, most_processes
from r2id.errors import InputError
from r2id.progress import say


def stage_processes() -> int:
    """Return NPROC, or else the number of GPUs, at least 1. Raises InputError for a wrong NPROC."""
    asked = os.environ.get("NPROC")
    if not asked:
        return max(gpu_count(), 1)
    if not asked.isdecimal() or int(asked) < 1:
        raise InputError(f"NPROC = {asked!r}: must be a whole number of processes, at least 1")
    return int(asked)


def training_processes(train: TrainConfig, tell: bool = False) -> int:
    """Return the number of processes that train: as many GPUs as share the batch evenly.

    Where some are left over, ``tell`` says so. NPROC processes are not reduced. Raises InputError
    when these do not share the batch evenly.
    """
    processes = stage_processes()
    if os.environ.get("NPROC"):
        try:
            micro_batch_size(train, processes)
        except InputError as error:
            raise InputError(f"NPROC = {processes}: {error}") from None
        return processes
    chosen = most_processes(train, processes)
    if tell and chosen < processes:
        say(
            f"train.batch = {train.batch} cannot be shared evenly by {processes} GPUs: "
            f"training on {chosen}"
        )
    return chosen


def main(words: list[str]) -> None:
    """Print the number of processes of a training; one per GPU where its config is wrong."""
    processes = stage_processes()
    try:
        config = next((word for word in words if not word.startswith("-")), "")
        overrides = [word for word in words if "=" in word and not word.startswith("-")]
        run = load_config(Path(config), overrides)
        if not isinstance(run, PipelineRun):
            processes = training_processes(run.train, tell=True)
    except InputError:
        pass  # r2id train says what is wrong
    print(processes)


if __name__ == "__main__":
    main(sys.argv[1:])
