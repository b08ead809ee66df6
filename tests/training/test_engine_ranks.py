"""Two CPU processes with DeepSpeed, at every ZeRO stage, against one process without it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.checkpoints import Checkpoint, reading
from tests.training import engine_ranks as job
from tests.training.children import Ranks

# Every start of DeepSpeed takes a while: stages 1 and 3, which go on at 2 and 0, stand for all in
# the fast tests.
STAGES = [
    pytest.param(stage, marks=pytest.mark.slow if stage in (0, 2) else ()) for stage in range(4)
]
# Between engines and numbers of ranks, only the order of float32 sums differs; Adam magnifies that
# where a gradient is nearly zero. The last step's learning rate, which is what one update moves a
# weight, is 4e-3.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}
ELASTIC = (1, 2, 3, 2, 1, None, 3, None, 0)
"""ZeRO stage of each step of a run that never goes on as it was; None is one process without
DeepSpeed.
"""
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (3, {}),
    (3, {"sub_group_size": 200}),
    (3, {"offload_optimizer": {"device": "cpu"}}),
    (2, {"round_robin_gradients": True}),
    (1, {"offload_optimizer": {"device": "cpu"}}),
    (3, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
]
"""DeepSpeed's settings that lay the masters out in other ways."""

Local = tuple[Path, list[float]]
Trained = Callable[[int], tuple[Path, dict[str, list[float]]]]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Local:
    """One process without DeepSpeed: folder with checkpoints half-way and at the end, and its
    norms.
    """
    folder = tmp_path_factory.mktemp("engines")
    engine = job.make("local", 0, job.ALONE)
    norms = job.run(engine, 0, job.HALF, job.ALONE)
    job.save(folder / "local", engine.state())
    norms += job.run(engine, job.HALF, job.STEPS, job.ALONE)
    job.save(folder / "local-end", engine.state())
    return folder, norms


@pytest.fixture(scope="module")
def trained(ranks: Ranks, local: Local) -> Trained:
    """ZeRO stage → folder and norms of its trainings, see ``engine_ranks.train_stage``."""

    @cache
    def of(stage: int) -> tuple[Path, dict[str, list[float]]]:
        folder = local[0] / f"zero-{stage}"
        return folder, ranks(job.train_stage, stage, folder)[0]

    return of


def weights(folder: Path, step: int = job.STEPS) -> dict[str, torch.Tensor]:
    """Everything that a checkpoint holds, by kind and name."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    return {
        f"{kind}.{name}": value
        for kind in ("model", "ema", "optimizer")
        for name, value in Checkpoint.open(path).tensors(kind).items()
    }


def local_norms(stage: str = "riae", precision: str = "float32") -> list[float]:
    engine = job.make("local", 0, job.ALONE, stage, precision)
    return job.run(engine, 0, job.STEPS, job.ALONE, stage)


def test_collectives(ranks: Ranks) -> None:
    same = {"sum": 1, "ranks": 2, "broadcast": {"rank": 0}}
    assert ranks(job.collectives) == [
        {**same, "kept": rank, "main": rank == 0} for rank in range(2)
    ]


def test_local_engine_refuses_many_processes(ranks: Ranks) -> None:
    assert all("one process" in said for said in ranks(job.refused))


def test_a_damaged_checkpoint_is_not_gone_on_from(
    ranks: Ranks, local: Local, tmp_path: Path
) -> None:
    """No rank loads it, whichever of them has hashed the damaged file."""
    folder = Path(shutil.copytree(local[0] / "local-end", tmp_path / "run"))

    def resumed() -> list[tuple[str, int]]:
        return [job.resume(job.ALONE, folder), *ranks(job.resume, folder)]

    assert resumed() == [("", 1)] * 3
    for name in ("optimizer.safetensors", "model.safetensors"):
        file = reading.find_checkpoint(folder) / name
        intact = file.read_bytes()
        file.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
        for said, loaded in resumed():
            assert said.startswith(f"{file}: damaged") and not loaded
        file.write_bytes(intact)


@pytest.mark.parametrize(
    ("zero", "named"),
    [
        ({"overlap_com": True}, "engine.deepspeed: overlap_com = True: "),
        ({"reduce_bucket_size": "x"}, "engine.deepspeed: reduce_bucket_size = 'x': "),
    ],
)
def test_what_deepspeed_does_not_take_is_one_line(
    zero: dict[str, object], named: str, ranks: Ranks
) -> None:
    for said in ranks(job.refused_by_deepspeed, zero):
        assert said.startswith(named) and "\n" not in said


@pytest.mark.parametrize("stage", STAGES)
def test_trains_as_one_local_process(stage: int, trained: Trained, local: Local) -> None:
    folder, norms = trained(stage)
    assert norms["norms"] == pytest.approx(local[1], rel=1e-4)
    torch.testing.assert_close(weights(folder), weights(local[0] / "local-end"), **CLOSE)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_equals_uninterrupted_bit_for_bit(stage: int, trained: Trained) -> None:
    folder, norms = trained(stage)
    assert norms["same"] == norms["norms"][job.HALF :]
    torch.testing.assert_close(
        weights(folder / f"resumed-at-{stage}"), weights(folder), rtol=0, atol=0
    )


@pytest.mark.parametrize("stage", STAGES)
def test_resumes_at_another_stage(stage: int, trained: Trained) -> None:
    folder, norms = trained(stage)
    assert norms["other"] == pytest.approx(norms["norms"][job.HALF :], rel=1e-4)
    torch.testing.assert_close(
        weights(folder / f"resumed-at-{(stage + 1) % 4}"), weights(folder), **CLOSE
    )


@pytest.mark.slow
def test_elastic_run_follows_the_uninterrupted_loss_curve(ranks: Ranks, tmp_path: Path) -> None:
    """Another ZeRO stage at every step, and 2 → 1 → 2 → 1 → 2 processes."""
    expected: list[float] = []
    job.run(job.make("local", 0, job.ALONE), 0, len(ELASTIC), job.ALONE, losses=expected)
    losses = [
        job.step_once(job.ALONE, None, tmp_path)
        if stage is None
        else ranks(job.step_once, stage, tmp_path)[0]
        for stage in ELASTIC
    ]
    assert losses == pytest.approx(expected, rel=1e-5)
    written = {
        step: sorted(
            file.name for file in (tmp_path / "checkpoints" / f"step-{step:08d}").glob("model*")
        )
        for step in (1, 6)
    }
    assert written == {
        1: ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        6: ["model.safetensors"],
    }


@pytest.mark.parametrize("stage", STAGES[1:])
def test_each_rank_writes_its_own_half(stage: int, trained: Trained) -> None:
    """No element twice, and neither rank writes much more than the other."""
    folder = trained(stage)[0] / "checkpoints" / f"step-{job.HALF:08d}"
    document = json.loads((folder / "checkpoint.json").read_text())
    total = sum(p.numel() for p in job.make("local", 0, job.ALONE).model.parameters())
    for kind, copies in (("model", 1), ("ema", 1), ("optimizer", 2)):
        elements = []
        for rank in (1, 2):
            facts = document["files"][f"{kind}-0000{rank}-of-00002.safetensors"]["tensors"].values()
            elements.append(
                sum(fact["part"][1] if fact["part"] else math.prod(fact["shape"]) for fact in facts)
            )
        assert sum(elements) == copies * total and max(elements) < 0.55 * copies * total


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_without_deepspeed_goes_on(stage: int, trained: Trained, local: Local) -> None:
    engine = job.make("local", 0, job.ALONE)
    newest = trained(stage)[0] / "checkpoints" / f"step-{job.HALF:08d}"
    reading.resume(newest, engine.check, engine.load)
    assert job.run(engine, job.HALF, job.STEPS, job.ALONE) == pytest.approx(
        local[1][job.HALF :], rel=1e-4
    )


@pytest.mark.parametrize(
    ("stage", "zero"),
    [LAYOUTS[0], *(pytest.param(*it, marks=pytest.mark.slow) for it in LAYOUTS[1:])],
)
def test_two_processes_go_on_from_one_without_deepspeed(
    stage: int, zero: dict[str, Any], ranks: Ranks, local: Local
) -> None:
    norms = ranks(job.go_on, stage, zero, local[0] / "local")[0]
    assert norms == pytest.approx(local[1][job.HALF :], rel=1e-4)


@pytest.mark.parametrize(
    "stage", [2, *(pytest.param(it, marks=pytest.mark.slow) for it in (0, 1, 3))]
)
def test_not_finite_on_one_rank_stops_both_before_the_update(stage: int, ranks: Ranks) -> None:
    for said, unchanged in ranks(job.spoil, stage):
        assert "step 1" in said and unchanged


@pytest.mark.slow
@pytest.mark.parametrize("stage", (1, 3))
def test_bfloat16_follows_the_local_engine(stage: int, ranks: Ranks, local: Local) -> None:
    norms = ranks(job.train_through, stage, "riae", "bfloat16")[0]
    assert norms == pytest.approx(local_norms(precision="bfloat16"), rel=2e-2)
    assert norms != pytest.approx(local[1], rel=1e-4), "not of float32"


@pytest.mark.slow
@pytest.mark.parametrize("stage", (2, 3))
def test_bfloat16_weights_follow_the_local_engine_from_unrounded_masters(
    stage: int, ranks: Ranks, tmp_path: Path
) -> None:
    found = ranks(job.train_rounded, stage, tmp_path)[0]
    assert found["kinds"] == ["torch.bfloat16", "torch.float32"]
    assert found["norms"] == pytest.approx(local_norms(precision="bfloat16"), rel=2e-2)
    assert found["resumed"] == found["norms"][job.HALF :], "bit for bit"
    torch.testing.assert_close(
        Checkpoint.open(tmp_path / "checkpoints" / "step-00000000").tensors("model"),
        job.make("local", 0, job.ALONE).model.state_dict(),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize(
    ("model", "stage"),
    [
        ("r2id", 3),
        *(
            pytest.param(*it, marks=pytest.mark.slow)
            for it in (("r2id", 2), ("attention", 1), ("attention", 2), ("attention", 3))
        ),
    ],
)
def test_other_models_train_as_one_local_process(model: str, stage: int, ranks: Ranks) -> None:
    norms = ranks(job.train_through, stage, model)[0]
    assert norms == pytest.approx(local_norms(model), rel=1e-4)


@pytest.mark.slow
def test_deepspeed_without_a_launcher_equals_the_local_engine(local: Local) -> None:
    folder, norms = local
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, job.__file__, str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not done.stdout, "stdout is for results"
    for stage, found in json.loads((folder / "alone.json").read_text()).items():
        assert found == pytest.approx(norms, rel=1e-5), f"ZeRO {stage}"
