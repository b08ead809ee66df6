"""The benchmarks still start: measurements are repeated rarely, and renames would break them."""

import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from r2id.config import OptimConfig, TrainConfig
from r2id.training.engines.local import LocalEngine

BENCH = Path(__file__).parent / "bench"
# Imports each script under a name of its own, so that it runs nothing.
IMPORT = "import runpy, sys; [runpy.run_path(name, run_name='bench') for name in sys.argv[1:]]"


@pytest.mark.slow
def test_every_benchmark_imports() -> None:
    scripts = sorted(map(str, BENCH.glob("*.py")))
    assert scripts
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *scripts],
        capture_output=True,
        text=True,
        check=False,
        cwd=BENCH,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", ["hourglass.py", "riae_scaling.py"])
def test_how_time_grows_is_measured(script: str) -> None:
    command = [sys.executable, BENCH / script, "--sides", "16", "32", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["side"] for row in found["rows"]] == [16, 32]
    assert all(row["seconds"] > 0 for row in found["rows"])


@pytest.mark.slow
def test_a_gpu_is_measured_part_by_part(tmp_path: Path) -> None:
    parts = ["peak", "sampling", "resume", "syncs", "zero"]
    command = [sys.executable, BENCH / "gpu.py", "--small", "--out", tmp_path, "--only", *parts]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in rows} == set(parts)
    assert not [row for row in rows if "failed" in str(row.get("note"))]
    assert all(row["same_bits"] for row in rows if row["part"] == "resume")
    assert "## peak" in (tmp_path / "gpu.md").read_text()
    subprocess.run([*command, "--minutes", "0"], check=True)
    later = json.loads((tmp_path / "gpu.json").read_text())
    assert later[: len(rows)] == rows  # what was measured stays
    assert [row["note"] for row in later[len(rows) :]] == ["no time left"] * len(parts)


def test_kernels_of_a_block_that_follow_one_another_are_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    roofline: Any = importlib.import_module("roofline")
    kernel = roofline.Kernel
    listed = [
        kernel("mul", 1, reads={1: 8, 2: 4}, writes={3: 8}),
        kernel("add", 1, reads={3: 8}, writes={4: 8}),
        kernel("silu", 1, reads={4: 8}, writes={5: 8}),
        kernel("mm", 1, 100, reads={5: 8, 6: 2}, writes={7: 8}),
        kernel("mul", 1, reads={7: 8, 4: 8}, writes={8: 8}),
        kernel("sum", None, reads={8: 8}, writes={9: 4}),
    ]
    found = roofline.compiled(listed)
    assert [part.name for part in found] == ["fused", "mm", "mul", "sum"]
    # 3 is of no use to others; 4 is, to the kernel after the product.
    assert found[0].reads == {1: 8, 2: 4} and found[0].writes == {4: 8, 5: 8}
    gpu = roofline.Gpu(bfloat16=50.0, float32=5.0, bandwidth=2.0)
    assert [part.seconds(gpu) for part in found] == [14, 9, 12, 6]
    assert kernel("mm", 1, 100, wide=True).seconds(gpu) == 20


@pytest.mark.slow
def test_a_step_is_estimated_for_gpus() -> None:
    command = [sys.executable, BENCH / "roofline.py", "--only", "MNIST RIAE", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert 0 < row["compiled_kernels"] < row["eager_kernels"]
    for found in row["gpus"].values():
        assert 0 < found["eager"]["share"] <= found["compiled"]["share"] < 1


class Line(nn.Module):
    """Fits a line to numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(1, 1)

    def forward(self, x: Tensor, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.model(x) - 2 * x).square().mean(), {}


def line() -> LocalEngine:
    train = TrainConfig(steps=1, precision="float32", ema=0.9)
    return LocalEngine(Line(), OptimConfig(), train, torch.device("cpu"))


def everything(engine: LocalEngine) -> list[Tensor]:
    moments = [engine.optimizer.state[master]["exp_avg_sq"] for master in engine.masters]
    parts = [*engine.masters, *moments, *engine.ema.averages["ema"]]
    return [part.detach().clone() for part in parts]


def test_training_for_seconds_goes_on_where_it_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    timed: Any = importlib.import_module("timed")
    monkeypatch.setattr(timed, "BETWEEN_SAVES", -1.0)  # after every step
    ticks = itertools.count()  # a step takes 1/64 s, whatever the process does meanwhile
    monkeypatch.setattr(timed.time, "process_time", lambda: next(ticks) / 64)
    file, first, second, steps = tmp_path / "state.pt", line(), line(), []

    def until_the_fifth(step: int) -> dict[str, Tensor]:
        if step == 5:
            raise KeyboardInterrupt
        return {"x": torch.rand(8, 1)}

    with pytest.raises(KeyboardInterrupt):
        timed.run(first, until_the_fifth, 1e-2, 60.0, end=0.1, before=59.0, file=file)
    interrupted = everything(first)

    def compared(step: int) -> dict[str, Tensor]:
        if not steps:
            for one, other in zip(everything(second), interrupted, strict=True):
                assert torch.equal(one, other)
        steps.append(step)
        return {"x": torch.rand(8, 1)}

    found = timed.run(second, compared, 1e-2, 59.1, end=0.1, before=0.0, file=file)
    assert steps[0] == 5 and found["steps"] == steps[-1] + 1
    assert 59.1 <= found["cpu_seconds"] < 60  # those before the interruption are counted
    average = second.ema.averages["ema"][0]
    assert torch.equal(second.model.weight.detach(), average)
