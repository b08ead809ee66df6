"""What training costs beyond the step itself, on a CPU.

    OMP_NUM_THREADS=2 python tests/bench/overheads.py [deepspeed] [tracking] [processes]
        [--rounds 3] [--steps 8] [--json]

deepspeed: the reference R2ID (22.7 M parameters) by DeepSpeed in one process, ZeRO 1, against the
local engine. processes: two processes of one thread, ZeRO 1, against one pinned to one core. Each
is measured in processes of their own, in turn; what counts is each one's quickest round.

tracking: the whole training loop on cached latents at the default log_every. MLflow and the moving
average are switched on and off from one stretch of log_every steps to the next, in one process. A
stretch with them lasts until MLflow has recorded the last entry, which in a run happens beside the
next steps.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from contextlib import chdir
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from measure import HERE, alternate, child

from data_prep.prepare import prepare
from r2id.config import PrepareConfig, TrainConfig, load_config
from r2id.training.ema import Ema
from r2id.training.encode import encode
from r2id.training.loop import train
from r2id.training.tracking import Tracker

CONFIGS = HERE.parent.parent / "configs" / "mnist"
STRETCH = TrainConfig.model_fields["log_every"].default
BATCH = 64  # divides into two processes


def steps_of(launcher, options, threads, *overrides):
    """Measures the reference R2ID's step in a child process, or several."""
    command = [
        *launcher,
        HERE / "train_step.py",
        CONFIGS / "reference-r2id.toml",
        "--size",
        "8x8",
        "--json",
        "--steps",
        str(options.steps),
        f"train.batch={BATCH}",
        *overrides,
    ]
    return partial(child, command, {**os.environ, "OMP_NUM_THREADS": str(threads)})


def deepspeed(options):
    measured = partial(steps_of, [sys.executable], options, torch.get_num_threads())
    found = alternate(
        {
            "plain engine": measured("engine.kind=local"),
            "DeepSpeed, ZeRO 1": measured("engine.kind=deepspeed", "engine.zero_stage=1"),
        },
        options.rounds,
    )
    return compare("DeepSpeed over the plain engine, time of a step", found, at_most=1.15)


def processes(options):
    core = min(os.sched_getaffinity(0))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    found = alternate(
        {
            "two processes, ZeRO 1": steps_of(
                torchrun, options, 1, "engine.kind=deepspeed", "engine.zero_stage=1"
            ),
            "one pinned to a core": steps_of(
                ["taskset", "-c", str(core), sys.executable], options, 1, "engine.kind=local"
            ),
        },
        options.rounds,
    )
    return compare("two processes over one, images/s", found, at_least=1.6)


def tracking(options):
    stretches = 1 + 2 * options.rounds
    with tempfile.TemporaryDirectory() as name, chdir(name):  # MLflow's store goes there
        run = load_config(
            CONFIGS / "reference-r2id.toml",
            [
                *latents(Path(name)),
                "run=r2id",
                f"train.steps={STRETCH * stretches}",
                f"train.log_every={STRETCH}",
                "train.save_every=1000000",
                "train.preview_every=1000000",
            ],
        )
        marks = switch_in_turn()
        train(run)
    seconds = [
        after - before for before, after in pairwise(marks)
    ]  # the first stretch, a warm-up, left out
    found = {
        "without": {"ms": min(seconds[1::2]) / STRETCH * 1e3},
        "with both": {"ms": min(seconds[0::2]) / STRETCH * 1e3},
    }
    return compare("MLflow and moving average over neither, time of a step", found, at_most=1.03)


def latents(folder):
    """Settings that name the digits' latents on a grid of 8×8 and the codec they are of."""
    data = prepare(PrepareConfig(dataset="digits", out=folder / "data"))
    codec = load_config(
        CONFIGS / "reference-riae.toml",
        [
            f"data.shards={data}",
            "data.workers=0",
            f"run={folder / 'riae'}",
            "train.steps=1",
            "tracking.enabled=false",
        ],
    )
    train(codec)
    encode(codec.run, Path(data), folder / "latents")
    return [
        f"data.shards={data}",
        f"data.latents={folder / 'latents'}",
        f"codec={codec.run}",
        "data.workers=0",
    ]


def switch_in_turn():
    """Switch MLflow and the average on in every other stretch, off in the first.

    Returns a list of when each stretch ends, which grows as the run goes on.
    """
    update, metrics, marks = Ema.update, Tracker.metrics, []

    def on(step):
        return step // STRETCH % 2 == 1

    def some_updates(self, step):
        if on(step):
            update(self, step)

    def some_metrics(self, values, step):
        if on(step - 1):
            metrics(self, values, step)
            recorded = threading.Event()
            self._jobs.put(recorded.set)
            recorded.wait()
        marks.append(time.perf_counter())

    Ema.update, Tracker.metrics = some_updates, some_metrics
    return marks


def compare(name, found, at_most=None, at_least=None):
    """The second's time over the first's, and what it should be."""
    base, other = (figures["ms"] for figures in found.values())
    goal = {"at_most": at_most} if at_most else {"at_least": at_least}
    return {
        "name": name,
        "ms": {way: figures["ms"] for way, figures in found.items()},
        "ratio": other / base,
        **goal,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", metavar="WHAT", help="deepspeed, tracking, processes; none is all"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    known = {"deepspeed": deepspeed, "tracking": tracking, "processes": processes}
    if unknown := set(options.what) - set(known):
        parser.error(f"{sorted(unknown)[0]!r}: must be one of {', '.join(known)}")
    results = []
    for what in options.what or known:
        results.append(found := known[what](options))
        if not options.json:
            goal = (
                f"at most {found['at_most']}"
                if "at_most" in found
                else f"at least {found['at_least']}"
            )
            print(
                f"{found['name']}: {found['ratio']:.3f} (goal: {goal}); "
                + ", ".join(f"{way} {ms:.1f} ms" for way, ms in found["ms"].items()),
                flush=True,
            )
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
