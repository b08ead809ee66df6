"""Training for a number of CPU seconds, which goes on where it was interrupted."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from r2id import rng
from r2id.files import write_atomic
from r2id.training.engines.local import LocalEngine

WARM_UP = 0.05
"""Share of the seconds in which the learning rate rises to its peak."""
BETWEEN_SAVES = 60.0  # seconds by the clock

Load = Callable[[int], Any]
"""A step's number → its batch. What it takes is not counted."""
Inputs = Callable[[Any], dict[str, Any]]
"""A batch → arguments of the loss module. What it takes is counted."""


def run(
    engine: LocalEngine,
    load: Load,
    rate: float,
    seconds: float,
    *,
    end: float,
    inputs: Inputs = lambda batch: batch,
    before: float = 0.0,
    seed: int = 0,
    file: Path | None = None,
) -> dict[str, float]:
    """Train with a peak learning rate for that many CPU seconds; leaves the averaged weights.

    ``before`` of the seconds have been used already; at least one step is made. The rate rises,
    then falls along a cosine to ``end`` times its peak as the seconds end, however many steps there
    are. With a ``file`` the state is kept there every minute, and an interrupted training goes on
    from it. Seconds are those of the process while it computes: loading does not count.
    """
    used, wall, step = before, 0.0, 0
    if file is not None and file.is_file():
        used, wall, step = _restore(engine, file)
    saved = time.monotonic()
    while used < seconds or not step:
        batch = load(step)
        began, began_wall = time.process_time(), time.perf_counter()
        torch.manual_seed(int(rng.fold(seed, step)))  # of dropout
        loss, _ = engine.forward({**inputs(batch), "step": step})
        engine.backward(loss, 1)
        engine.step(rate * _schedule(used / seconds, end), step)
        engine.ema.update(step)
        used += time.process_time() - began
        wall += time.perf_counter() - began_wall
        step += 1
        if file is not None and time.monotonic() - saved > BETWEEN_SAVES:
            _keep(engine, file, (used, wall, step))
            saved = time.monotonic()
    averages = engine.ema_state()
    assert averages is not None
    engine.model.load_state_dict(averages)
    engine.module.eval()
    return {
        "steps": step,
        "seconds_per_step": (used - before) / step,
        "cpu_seconds": used,
        "wall_seconds": wall,
    }


def _schedule(share: float, end: float) -> float:
    """Return the learning rate relative to its peak, at a share of the seconds."""
    if share < WARM_UP:
        return max(0.02, share / WARM_UP)
    progress = min(1.0, (share - WARM_UP) / (1 - WARM_UP))
    return end + 0.5 * (1 - end) * (1 + math.cos(math.pi * progress))


def _keep(engine: LocalEngine, file: Path, place: tuple[float, float, int]) -> None:
    buffer = io.BytesIO()
    state = {
        "place": place,
        "model": engine.model.state_dict(),
        "optimizer": engine.optimizer.state_dict(),
        "averages": engine.ema.averages,
    }
    torch.save(state, buffer)
    write_atomic(file, buffer.getvalue())


def _restore(engine: LocalEngine, file: Path) -> tuple[float, float, int]:
    state = torch.load(file, weights_only=True)
    engine.model.load_state_dict(state["model"])
    engine.optimizer.load_state_dict(state["optimizer"])
    for kind, averages in state["averages"].items():
        for average, kept in zip(engine.ema.averages[kind], averages, strict=True):
            average.copy_(kept)
    used, wall, step = state["place"]
    return used, wall, step
