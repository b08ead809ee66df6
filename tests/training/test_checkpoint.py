"""Checkpoints: complete or absent, checked tensor by tensor, whatever interrupts the writing."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from r2id.errors import InputError, WorkError
from r2id.training import checkpoint
from r2id.training.checkpoint import Meta
from r2id.training.state import EngineState

STATS = {"mean": torch.tensor([0.5]), "std": torch.tensor([2.0])}


class Killed(BaseException):
    """Ends a save at once and cleans nothing up, as SIGKILL does."""


def state(step: int) -> EngineState:
    part = {"layer.weight": torch.full((2, 3), float(step)), "layer.bias": torch.arange(2.0)}
    return EngineState(model=part | {"counts": torch.ones(1)}, ema={k: v + 1 for k, v in part.items()},
                       exp_avg={k: v + 2 for k, v in part.items()}, exp_avg_sq={k: v + 3 for k, v in part.items()},
                       step=step)


def save(run: Path, step: int, keep: int = 2) -> Path:
    meta = Meta(stage="riae", step=step, samples=step * 8, seed=7, config={"train": {"sizes": [[1, 2]], "lr": 1e-3}},
                model={"channels": 1})
    return checkpoint.save(run, state(step), meta, keep, STATS)


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    meta = checkpoint.load_meta(folder)
    assert (meta.stage, meta.step, meta.samples, meta.seed) == ("riae", 3, 24, 7)
    assert meta.config == {"train": {"sizes": [[1, 2]], "lr": 1e-3}} and meta.model == {"channels": 1}
    torch.testing.assert_close(checkpoint.load_tensors(folder, "model"), state(3).model, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.load_tensors(folder, "ema"), state(3).ema, rtol=0, atol=0)
    torch.testing.assert_close(checkpoint.load_tensors(folder, "stats"), STATS, rtol=0, atol=0)
    moments = checkpoint.load_tensors(folder, "optimizer")
    assert torch.equal(moments["exp_avg_sq.layer.bias"], torch.arange(2.0) + 3)


def test_only_safetensors_and_json(tmp_path: Path) -> None:
    names = {file.name for file in save(tmp_path, 1).iterdir()}
    assert names == {"checkpoint.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors",
                     "stats.safetensors"}


def test_paths_that_mean_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert checkpoint.latest(tmp_path) == newest
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000010\n"
    for path in (tmp_path, tmp_path / "checkpoints", newest):
        assert checkpoint.resolve(path) == newest


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    one, other, third = save(tmp_path / "a", 1), save(tmp_path / "b", 1), save(tmp_path / "b", 2)
    assert checkpoint.identity(one) == checkpoint.identity(other) != checkpoint.identity(third)


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003", "step-00000004"]


def test_a_step_saved_again_replaces_the_old(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "left").touch()
    assert not (save(tmp_path, 3) / "left").exists()


def moments_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often a save reaches a point where it may be killed."""
    calls: list[Path] = []
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (calls.append(path), flush(path)))
    save(tmp_path / "count", 1)
    monkeypatch.undo()
    return len(calls)


@pytest.mark.parametrize("before_flush", [True, False])
def test_killed_at_any_moment_leaves_whole_checkpoints_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             before_flush: bool) -> None:
    flush, total = checkpoint._flush, moments_of_a_save(tmp_path, monkeypatch)
    assert total >= 8
    for moment in range(total):
        run, left = tmp_path / f"killed-{moment}", [moment]
        save(run, 1, keep=1)

        def fatal(path: Path, left: list[int] = left) -> None:
            if not before_flush:
                flush(path)
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            if before_flush:
                flush(path)

        monkeypatch.setattr(checkpoint, "_flush", fatal)
        with pytest.raises(Killed):
            save(run, 2, keep=1)
        monkeypatch.undo()
        found = checkpoint.resolve(run)
        step = checkpoint.load_meta(found).step
        assert step in (1, 2)
        for kind in ("model", "ema", "optimizer", "stats"):
            checkpoint.load_tensors(found, kind)
        save(run, 3, keep=1)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000003"]


def test_full_disk_is_one_line_and_the_older_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = save(tmp_path, 1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(WorkError, match=r"step-00000002: not written: .*No space left"):
        save(tmp_path, 2, keep=1)
    assert checkpoint.resolve(tmp_path) == older
    checkpoint.load_tensors(older, "model")


@pytest.mark.parametrize("kind", ["model", "ema", "optimizer", "stats"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, kind: str) -> None:
    file = save(tmp_path, 1) / f"{kind}.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match=rf"{kind}\.safetensors: damaged: "):
        checkpoint.load_tensors(tmp_path, kind)  # type: ignore[arg-type]


def test_truncated_or_missing_file(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"ema\.safetensors: missing or damaged"):
        checkpoint.load_tensors(tmp_path, "ema")
    file.unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors: missing or damaged"):
        checkpoint.load_tensors(tmp_path, "ema")


def test_part_that_the_stage_has_not(tmp_path: Path) -> None:
    meta = Meta(stage="r2id", step=1, samples=8, seed=0, config={}, model={})
    folder = checkpoint.save(tmp_path, state(1), meta, keep=1)
    with pytest.raises(InputError, match=r"holds no stats\.safetensors"):
        checkpoint.load_tensors(folder, "stats")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "missing or damaged"), ("[]", "missing or damaged"),
    ('{"format_version": 2}', "format_version 2; this version of r2id reads 1"),
    ('{"format_version": 1}', "damaged: stage: Field required"), ("{}", "format_version None")])
def test_description_that_is_no_description(tmp_path: Path, text: str, message: str) -> None:
    (save(tmp_path, 1) / "checkpoint.json").write_text(text)
    with pytest.raises(InputError, match=message):
        checkpoint.load_meta(tmp_path)


def test_description_names_every_tensor(tmp_path: Path) -> None:
    document = json.loads((save(tmp_path, 1) / "checkpoint.json").read_text())
    fact = document["files"]["model.safetensors"]["layer.weight"]
    assert fact["shape"] == [2, 3] and fact["dtype"] == "float32" and len(fact["sha256"]) == 64


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoint here"):
        checkpoint.resolve(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        checkpoint.resolve(tmp_path / "nowhere")


def test_weights_of_another_model(tmp_path: Path) -> None:
    tensors = checkpoint.load_tensors(save(tmp_path, 1), "ema")
    with pytest.raises(InputError, match="do not fit the model"):
        checkpoint.fit(nn.Linear(3, 4), tensors, tmp_path)


def test_state_of_another_model(tmp_path: Path) -> None:
    from tests.training import engine_ranks as job

    with pytest.raises(InputError, match=r"has no .*another model"):
        checkpoint.load_into(job.make("local", 0, job.ALONE), save(tmp_path, 1))
