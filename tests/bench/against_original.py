"""Training steps of r2id against those of the original project, in one run.

    OMP_NUM_THREADS=2 python tests/bench/against_original.py --original DIR [--steps 20]
        [--rounds 3] [--json]

DIR is a checkout of the original project, which is no part of this one. Each step is measured in a
process of its own, in turn, round after round; what counts is each one's quickest round. Widths,
heads, blocks, batch and data shape are the same (the published RIAE and the reference R2ID on MNIST
at 32×32). The original makes fewer steps, because its autoencoder takes seconds for one. Memory is
what a process takes at most beyond what it has before it makes the model.

r2id's step is measured as configured, and doing the original's work: in float32, every pixel
decoded, every image under its class and under none. The goals are set for the original's commits
with attention per query (fb27a89 to b97e9b7). Its figures are under "Speed and memory" in
tests/bench/README.md.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from measure import HERE, alternate, child

CONFIGS = HERE.parent.parent / "configs" / "mnist"
MEMORY_GOAL = 1 / 3
F32 = "train.precision=float32"
CONFIG = {"riae": "published-riae.toml", "r2id": "reference-r2id.toml"}


@dataclass(frozen=True)
class Model:
    size: str
    goal: float
    """Times the original's images/s."""
    theirs: str
    """The work that a step of theirs does."""
    fewer: int
    """Steps of ours for one of theirs."""
    ours: dict[str, list[str]]
    """Arguments of train_step.py for each way to run ours. The first has the goal."""


MODELS = {
    "riae": Model(
        "32x32",
        30,
        "float32, every pixel",
        10,
        {
            "bfloat16, 256 random pixels (as configured)": [],
            "float32, 256 random pixels": [F32],
            "bfloat16, every pixel": ["loss.decode_pixels=1024"],
            "float32, every pixel": [F32, "loss.decode_pixels=1024"],
        },
    ),
    "r2id": Model(
        "8x8",
        4,
        "float32, with and without class",
        4,
        {
            "bfloat16, class dropped at random (as configured)": [],
            "float32, class dropped at random": [F32],
            "bfloat16, with and without class": ["--both-conditions"],
            "float32, with and without class": [F32, "--both-conditions"],
        },
    ),
}


def measure(name, options, threads):
    """Each way's figures, the original's first."""
    model, config = MODELS[name], CONFIGS / CONFIG[name]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    fewer = str(max(2, options.steps // model.fewer))
    theirs = [sys.executable, HERE / "original_step.py", options.original, config, "--steps", fewer]
    ours = [
        sys.executable,
        HERE / "train_step.py",
        config,
        "--size",
        model.size,
        "--steps",
        str(options.steps),
        "--json",
    ]
    commands = {
        f"original: {model.theirs}": theirs,
        **{f"ours: {way}": [*ours, *more] for way, more in model.ours.items()},
    }
    found = alternate(
        {way: partial(child, command, environment) for way, command in commands.items()},
        options.rounds,
    )
    original = next(iter(found.values()))
    for figures in found.values():
        figures["times_as_fast"] = figures["images_per_second"] / original["images_per_second"]
        figures["share_of_memory"] = figures["memory"] / original["memory"]
    return found


def table(name, found, threads):
    model, original = MODELS[name], next(iter(found.values()))
    print(
        f"{name} at {model.size}, {threads} threads; original: {original['classes']}; goals for "
        f"ours as configured: {model.goal:g} times as fast, {MEMORY_GOAL:.2f} of the memory"
    )
    for way, figures in found.items():
        print(
            f"  {way:52}{figures['parameters'] / 1e6:6.2f} M{figures['ms']:9.1f} ms"
            f"{figures['images_per_second']:8.1f} /s{figures['times_as_fast']:8.1f} ×"
            f"{figures['memory'] / 1e9:8.2f} GB{figures['share_of_memory']:7.2f}"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--original", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--steps", type=int, default=20, help="of ours, after a few that do not count"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    results = {}
    for name in options.models:
        results[name] = measure(name, options, threads)
        if not options.json:
            table(name, results[name], threads)
    if options.json:
        print(
            json.dumps(
                {
                    "threads": threads,
                    "memory_goal": MEMORY_GOAL,
                    "goals": {n: m.goal for n, m in MODELS.items()},
                    "found": results,
                }
            )
        )


if __name__ == "__main__":
    main()
