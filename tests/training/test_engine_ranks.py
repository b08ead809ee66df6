"""Two CPU processes under torchrun, at every ZeRO stage, against one process without DeepSpeed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.checkpoints import Checkpoint, reading
from tests.training import engine_ranks as job
from tests.training import loop_ranks

STAGES = ("0", "1", "2", "3")
# Between engines and numbers of ranks, only the order of float32 sums differs; Adam magnifies that where a gradient is
# nearly zero. The last step's learning rate, which is what one update moves a weight, is 4e-3.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.fixture(scope="module")
def local(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """One process without DeepSpeed: folder with checkpoints half-way and at the end, and its norms."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "digits").symlink_to(digits)
    engine = job.make("local", 0, job.ALONE)
    norms = job.run(engine, 0, job.HALF, job.ALONE)
    job.save(folder / "local", engine.state())
    norms += job.run(engine, job.HALF, job.STEPS, job.ALONE)
    job.save(folder / "local-end", engine.state())
    return folder, norms


@pytest.fixture(scope="module")
def ranks(local: tuple[Path, list[float]]) -> dict[str, Any]:
    """What two processes report; see engine_ranks.py."""
    folder, _ = local
    _start(
        [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            job.__file__,
            str(folder),
        ]
    )
    return json.loads((folder / "result.json").read_text())


def _start(arguments: list[str]) -> None:
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stdout, "stdout is for results"


def weights(folder: Path, step: int = job.STEPS) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by kind and name."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{kind}.{name}": value
        for kind in ("model", "ema", "optimizer")
        for name, value in Checkpoint.open(path).tensors(kind).items()
    }


def test_collectives(ranks: dict[str, Any]) -> None:
    assert (ranks["sum"], ranks["max"], ranks["kept"], ranks["ranks"]) == (1, 1, 0, 2)
    assert ranks["main"] and ranks["broadcast"] == {"rank": 0}


def test_local_engine_refuses_many_processes(ranks: dict[str, Any]) -> None:
    assert ranks["refuses_local"]


@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_one_local_process(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    folder, norms = local
    assert ranks["stages"][stage]["norms"] == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(
        weights(folder / f"zero-{stage}"), weights(folder / "local-end"), **CLOSE
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted_bit_for_bit(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    folder = local[0] / f"zero-{stage}"
    assert ranks["stages"][stage]["same"] == ranks["stages"][stage]["norms"][job.HALF :]
    torch.testing.assert_close(
        weights(folder / f"resumed-at-{stage}"), weights(folder), rtol=0, atol=0
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resumes_at_another_stage(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    folder, norms = local[0] / f"zero-{stage}", ranks["stages"][stage]
    assert norms["other"] == pytest.approx(norms["norms"][job.HALF :], rel=1e-4)
    torch.testing.assert_close(
        weights(folder / f"resumed-at-{(int(stage) + 1) % 4}"), weights(folder), **CLOSE
    )


def test_elastic_run_follows_the_uninterrupted_loss_curve(
    ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    """Another ZeRO stage at every step, and 2 → 1 → 2 → 1 → 2 processes."""
    losses: list[float] = []
    job.run(job.make("local", 0, job.ALONE), 0, len(job.ELASTIC), job.ALONE, losses=losses)
    assert ranks["elastic"] == pytest.approx(losses, rel=1e-5)
    written = {
        step: sorted(
            file.name
            for file in (local[0] / "elastic" / "checkpoints" / f"step-{step:08d}").glob("model*")
        )
        for step in (1, 6)
    }
    assert written == {
        1: ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        6: ["model.safetensors"],
    }


@pytest.mark.parametrize("stage", ("1", "2", "3"))
def test_each_rank_writes_its_own_half(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    """No element twice, and neither rank writes much more than the other."""
    folder = local[0] / f"zero-{stage}" / "checkpoints" / f"step-{job.HALF:08d}"
    document = json.loads((folder / "checkpoint.json").read_text())
    for kind, copies in (("model", 1), ("ema", 1), ("optimizer", 2)):
        elements = []
        for rank in (1, 2):
            facts = document["files"][f"{kind}-0000{rank}-of-00002.safetensors"]["tensors"].values()
            elements.append(
                sum(fact["part"][1] if fact["part"] else math.prod(fact["shape"]) for fact in facts)
            )
        total = sum(p.numel() for p in job.make("local", 0, job.ALONE).model.parameters())
        assert sum(elements) == copies * total and max(elements) < 0.55 * copies * total


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_without_deepspeed_goes_on(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    folder, norms = local
    engine = job.make("local", 0, job.ALONE)
    reading.resume(engine, folder / f"zero-{stage}" / "checkpoints" / f"step-{job.HALF:08d}")
    assert job.run(engine, job.HALF, job.STEPS, job.ALONE) == pytest.approx(
        norms[job.HALF :], rel=1e-4
    )


@pytest.mark.parametrize("number", range(len(job.LAYOUTS)))
def test_two_processes_go_on_from_one_without_deepspeed(
    number: int, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    assert ranks["from_local"][number] == pytest.approx(local[1][job.HALF :], rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_at_ten_random_steps_by_a_signal_to_one_rank(
    stage: str, ranks: dict[str, Any]
) -> None:
    """The training loop, resumed ten times, equals the uninterrupted one bit for bit. The signal comes to rank 1 amid the
    accumulation: both stop at that step's end, and a checkpoint holds whole steps only."""
    result = ranks["loop"][stage]["stopped"]
    assert result["differ"] == []
    assert result["saved"] == [[step, step * 64] for step in [*loop_ranks.STOPS, loop_ranks.STEPS]]
    assert all(
        f"step {step} of" in said
        for step, said in zip(loop_ranks.STOPS, result["said"], strict=True)
    )


@pytest.mark.parametrize("how", loop_ranks.HOWS)
@pytest.mark.parametrize("stage", STAGES)
def test_what_is_not_finite_on_one_rank_leaves_a_clean_checkpoint(
    stage: str, how: str, ranks: dict[str, Any]
) -> None:
    """A loss, one rank's gradient, a parameter: the loop ends on both ranks before the update."""
    result = ranks["loop"][stage][how]
    assert all(
        f"step {loop_ranks.SPOILT}: " in said and "before the update" in said
        for said in result["said"]
    ), result
    assert {"loss": "the loss makes", "gradient": "in the backward pass", "parameter": "decoder.0"}[
        how
    ] in result["said"][1]
    assert (result["step"], result["damages"], result["finite"]) == (loop_ranks.SAVED, [], True)


@pytest.mark.parametrize("stage", STAGES)
def test_not_finite_on_one_rank_stops_both_before_the_update(
    stage: str, ranks: dict[str, Any]
) -> None:
    assert ranks["spoilt"][stage]


@pytest.mark.parametrize("stage", ("1", "3"))
def test_bfloat16_follows_the_local_engine(stage: str, ranks: dict[str, Any]) -> None:
    norms = job.run(job.make("local", 0, job.ALONE, precision="bfloat16"), 0, job.STEPS, job.ALONE)
    assert ranks["bfloat16"][stage] == pytest.approx(norms, rel=2e-2)
    assert ranks["bfloat16"][stage] != ranks["stages"][stage]["norms"]


@pytest.mark.parametrize("stage", ("2", "3"))
def test_bfloat16_weights_follow_the_local_engine_from_unrounded_masters(
    stage: str, ranks: dict[str, Any], local: tuple[Path, list[float]]
) -> None:
    norms = job.run(job.make("local", 0, job.ALONE, precision="bfloat16"), 0, job.STEPS, job.ALONE)
    found, start = (
        ranks["bfloat16_weights"][stage],
        job.make("local", 0, job.ALONE).model.state_dict(),
    )
    assert found["kinds"] == ["torch.bfloat16", "torch.float32"]
    assert found["norms"] == pytest.approx(norms, rel=2e-2)
    assert found["resumed"] == found["norms"][job.HALF :], "bit for bit"
    torch.testing.assert_close(
        Checkpoint.open(local[0] / f"rounded-{stage}" / "checkpoints" / "step-00000000").tensors(
            "model"
        ),
        start,
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("stage", ("2", "3"))
def test_r2id_trains_as_one_local_process(stage: str, ranks: dict[str, Any]) -> None:
    norms = job.run(job.make("local", 0, job.ALONE, "r2id"), 0, job.STEPS, job.ALONE, "r2id")
    assert ranks["r2id"][stage] == pytest.approx(norms, rel=1e-4)


def test_deepspeed_without_a_launcher_equals_the_local_engine(
    local: tuple[Path, list[float]],
) -> None:
    folder, norms = local
    _start([job.__file__, "--alone", str(folder)])
    for stage, found in json.loads((folder / "alone.json").read_text()).items():
        assert found == pytest.approx(norms, rel=1e-5), f"ZeRO {stage}"
