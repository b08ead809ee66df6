"""What the benchmarks share: memory of a process, rate of a step, children in turn, scaling."""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from r2id.config import Run, load_config

HERE = Path(__file__).parent


def resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most since the last reset (VmHWM)."""
    found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def reset_peak() -> None:
    """Set VmHWM to VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def baseline() -> int:
    """Return the bytes in memory before a step is made, from which VmHWM grows.

    Has libraries load first what they keep after their first use, which belongs to no step.
    """
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters())
    for bfloat16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            layer(torch.ones(64, 64)).sum().backward()
    optimizer.step()
    reset_peak()
    return resident("VmRSS")


def rate(
    run: Callable[[int, int], object], steps: int, warmup: int, batch: int
) -> dict[str, float]:
    """Milliseconds of a step, and images per second of the whole job.

    ``run(count, first)`` makes that many steps, numbered from ``first``.
    """
    run(warmup, 0)
    began = time.perf_counter()
    run(steps, warmup)
    seconds = (time.perf_counter() - began) / steps
    return {"ms": seconds * 1e3, "images_per_second": batch / seconds}


def child(command: Sequence[str | Path], environment: Mapping[str, str]) -> dict[str, Any]:
    """Run a process and return the JSON object that it prints as its last line.

    When it fails, it has said why, and this process ends with the same code.
    """
    done = subprocess.run(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def alternate(
    commands: Mapping[str, Callable[[], dict[str, Any]]], rounds: int
) -> dict[str, dict[str, Any]]:
    """Measure each command once a round, one after the other, so that all meet the same machine.

    Returns each one's quickest round, which others disturbed least, with the least of its peaks of
    memory.
    """
    best: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for name, measured in commands.items():
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            found = measured()
            before = best.get(name, found)
            least = min(before["memory"], found["memory"])
            best[name] = (found if found["ms"] < before["ms"] else before) | {"memory": least}
    return best


def scaling_arguments(words: str | None, sides: Sequence[int]) -> argparse.Namespace:
    """Read the command line of a measurement at pictures of several sides."""
    parser = argparse.ArgumentParser(
        description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--sides", nargs="+", type=int, default=sides)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def config_of(text: str, overrides: Sequence[str]) -> Run:
    """Read the TOML text of a config, with overrides."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.toml"
        file.write_text(text)
        return load_config(file, overrides)


def show_scaling(rows: Sequence[Mapping[str, float]], as_json: bool) -> None:
    """Print each row's side, seconds and, if measured, bytes; and how seconds grow with pixels."""
    sides, seconds = (np.log([row[name] for row in rows]) for name in ("side", "seconds"))
    exponent = float(np.polyfit(2 * sides, seconds, 1)[0])
    if as_json:
        print(json.dumps({"rows": rows, "exponent": exponent}))
        return
    for row in rows:
        memory = f"  {row['bytes'] / 2**20:8.0f} MiB" if "bytes" in row else ""
        print(f"{row['side']:5}²  {row['seconds']:8.3f} s{memory}")
    print(f"time grows with pixels to the power {exponent:.3f}")
