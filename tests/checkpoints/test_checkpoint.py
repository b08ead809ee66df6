"""Checkpoints: complete or absent, every byte checked, whatever interrupts the writing."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from r2id.checkpoints import Checkpoint, reading, writing
from r2id.checkpoints.files import Meta, write_description, write_part
from r2id.checkpoints.state import EngineState, whole
from r2id.checkpoints.trained import open_trained
from r2id.errors import InputError
from r2id.files import step_of
from tests.training import children
from tests.training import engine_ranks as job
from tests.training.children import STATS, save, state
from tests.waiting import free_port

KINDS = ("model", "ema", "optimizer", "stats")


def test_round_trip(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    assert folder == tmp_path / "checkpoints" / "step-00000003"
    meta = Checkpoint.open(folder).meta
    assert (meta.stage, meta.step, meta.samples, meta.seed) == ("riae", 3, 24, 7)
    assert meta.config == {"train": {"sizes": [[1, 2]], "lr": 1e-3}} and meta.model == {
        "channels": 1
    }
    for kind, parts in state(3).parts.items():
        saved = {name: part.values for name, part in parts.items()}
        torch.testing.assert_close(Checkpoint.open(folder).tensors(kind), saved, rtol=0, atol=0)
    torch.testing.assert_close(Checkpoint.open(folder).tensors("stats"), STATS, rtol=0, atol=0)


def test_a_tensor_without_elements(tmp_path: Path) -> None:
    meta = Checkpoint.open(save(tmp_path, 1)).meta
    empty = {"none": torch.zeros(0, 3)}
    folder = writing.save(tmp_path, EngineState({"model": whole(empty)}, 1), meta, keep=1)
    assert Checkpoint.open(folder).tensors("model")["none"].shape == (0, 3)


def test_only_safetensors_and_json_that_the_umask_lets_others_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    assert {file.name for file in folder.iterdir()} == {
        "checkpoint.json",
        *(f"{kind}.safetensors" for kind in KINDS),
    }
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {
        folder.stat().st_mode & 0o666
    }
    assert torch.equal(load_file(folder / "model.safetensors")["layer.bias"], torch.arange(2.0))


def test_paths_that_mean_a_checkpoint(tmp_path: Path) -> None:
    assert Checkpoint.open_newest(tmp_path) is None
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    assert Checkpoint.open_newest(tmp_path).path == newest
    pointer = tmp_path / "checkpoints" / "latest"
    assert pointer.read_text() == "step-00000010\n"
    for path in (tmp_path, tmp_path / "checkpoints", newest, str(tmp_path), pointer):
        assert Checkpoint.open(path).path == open_trained(path).path == newest
    opened = Checkpoint.open(newest)
    assert Checkpoint.open(opened) is opened, "what is open is not opened again"


@pytest.mark.parametrize("place", [".", "run", "run/checkpoints", "run/checkpoints/step-00000001"])
def test_the_run_of_a_checkpoint_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = save(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path / place)
    assert Checkpoint.open(os.path.relpath(folder)).run.samefile(tmp_path / "run")


def test_identity_is_of_the_content(tmp_path: Path) -> None:
    one, other, third = save(tmp_path / "a", 1), save(tmp_path / "b", 1), save(tmp_path / "b", 2)
    assert (
        Checkpoint.open(one).identity
        == Checkpoint.open(other).identity
        != Checkpoint.open(third).identity
    )


def test_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    for step in range(1, 9):
        save(tmp_path, step, keep=2, milestone_every=3)
    assert [step_of(path) for path in reading.list_checkpoints(tmp_path / "checkpoints")] == [
        3,
        6,
        7,
        8,
    ]
    save(tmp_path, 9, keep=1)  # the run goes on without the setting
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000003",
        "step-00000006",
        "step-00000009",
    ]


def test_a_copy_of_another_name_is_left_alone(tmp_path: Path) -> None:
    copy = tmp_path / "checkpoints" / "step-00000002-backup"
    save(tmp_path, 2).rename(copy)
    assert Checkpoint.open_newest(tmp_path) is None
    newest = [save(tmp_path, step, keep=1, milestone_every=5) for step in (1, 3)][-1]
    opened = Checkpoint.open_newest(tmp_path)
    assert opened is not None and opened.path == newest and not reading.find_damages(copy)


def test_a_step_saved_again_replaces_the_old(tmp_path: Path) -> None:
    folder = save(tmp_path, 3)
    (folder / "left").touch()
    assert not (save(tmp_path, 3) / "left").exists()


def test_tidy_sweeps_and_points_to_the_newest_that_is_left(tmp_path: Path) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    for step in (1, 2):
        writing.save_snapshot(
            tmp_path, state(step), Checkpoint.open(older).meta.model_copy(update={"step": step})
        )
    for file in newer.iterdir():
        file.unlink()
    newer.rmdir()
    (tmp_path / "checkpoints" / ".tmp-step-00000003").mkdir()
    writing.tidy(tmp_path, start=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000001",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"
    assert [path.name for path in reading.list_checkpoints(tmp_path / "ema")] == [
        "step-00000001"
    ], "2 is of another past"


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_any_moment_leaves_whole_checkpoints_alone(tmp_path: Path, before: bool) -> None:
    moment, exit_codes = 0, []
    while not exit_codes or exit_codes[-1]:
        run = tmp_path / f"killed-{moment}"
        save(run, 1, keep=1)
        with children.ended(children.start(children.save_and_die, run, 2, moment, before)) as child:
            child.join(60)
        exit_codes.append(child.exitcode)
        found = reading.find_checkpoint(run)
        assert Checkpoint.open(found).step in (1, 2) and not reading.find_damages(found)
        assert (run / "checkpoints" / "latest").read_text().strip() in {
            path.name for path in reading.list_checkpoints(run / "checkpoints")
        }
        save(run, 3, keep=1)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
            "latest",
            "step-00000003",
        ]
        moment += 1
    assert exit_codes == [-signal.SIGKILL] * (len(exit_codes) - 1) + [0] and len(exit_codes) > 8


def ranks_save(
    run: Path, step: int, full: int | None = None, dying: int | None = None
) -> list[str]:
    """What two ranks say of a save; nothing when one dies."""
    port = free_port()
    run.mkdir(exist_ok=True)
    with (
        children.ended(
            children.start(children.save_as_rank, run, 0, 2, port, step, full, dying)
        ) as first,
        children.ended(
            children.start(children.save_as_rank, run, 1, 2, port, step, full, dying)
        ) as second,
    ):
        first.join(60)
        second.join(60)
    if dying is not None:
        assert sorted((first.exitcode, second.exitcode)) == [-signal.SIGKILL, 1], (
            "the other ends at once, and in error"
        )
        return []
    assert (first.exitcode, second.exitcode) == (0, 0)
    return [(run / f"said-{rank}").read_text() for rank in (0, 1)]


def test_two_ranks_write_what_one_reads(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ranks_save(run, 3) == [str(run / "checkpoints" / "step-00000003")] * 2
    opened = Checkpoint.open(run)
    assert sorted(opened.files) == [
        "ema-00001-of-00002.safetensors",
        "ema-00002-of-00002.safetensors",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "optimizer-00002-of-00002.safetensors",
        "stats-00001-of-00002.safetensors",
    ]
    for kind, parts in state(3).parts.items():
        saved = {name: part.values for name, part in parts.items()}
        torch.testing.assert_close(Checkpoint.open(run).tensors(kind), saved, rtol=0, atol=0)
    whole = state(3).parts["optimizer"]["exp_avg_sq.layer.weight"].values.flatten()
    for start in range(6):
        for count in range(1, 7 - start):
            part = opened.read("optimizer", "exp_avg_sq.layer.weight", start, count)
            assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_on_one_rank_stops_both_with_one_reason(tmp_path: Path, full: int) -> None:
    run = tmp_path / "run"
    older = save(run, 1)
    said = ranks_save(run, 2, full=full)
    assert said[0] == said[1] and said[0].startswith("WorkError: ") and "step-00000002" in said[0]
    assert reading.find_checkpoint(run) == older and not reading.find_damages(older)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000001"], (
        "nothing takes up space"
    )


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_killed_in_a_save_leaves_the_older_one(tmp_path: Path, dying: int) -> None:
    run = tmp_path / "run"
    older = save(run, 1)
    ranks_save(run, 2, dying=dying)
    assert (run / "checkpoints" / ".tmp-step-00000002").is_dir(), "killed inside"
    assert reading.find_checkpoint(run) == older and not reading.find_damages(older)
    ranks_save(run, 2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000001",
        "step-00000002",
    ]
    assert not reading.find_damages(run)


@pytest.mark.parametrize("file", [*(f"{kind}.safetensors" for kind in KINDS), "checkpoint.json"])
def test_any_flipped_byte_is_noticed_and_the_one_before_offered(tmp_path: Path, file: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    intact = (newer / file).read_bytes()
    draw = random.Random(file)
    for place in {0, len(intact) - 1, *(draw.randrange(len(intact)) for _ in range(25))}:
        data = bytearray(intact)
        data[place] ^= 1 << draw.randrange(8)
        (newer / file).write_bytes(data)
        assert len(reading.find_damages(newer)) == 1
        with pytest.raises(InputError) as caught:
            Checkpoint.open(tmp_path).tensors(
                "model" if file == "checkpoint.json" else file.split(".")[0]
            )
        message = str(caught.value)
        assert str(newer / file) in message and "\n" not in message
        assert str(older) in message
    (newer / file).write_bytes(intact)
    assert not reading.find_damages(newer)


def test_truncated_or_missing_file(tmp_path: Path) -> None:
    file = save(tmp_path, 1) / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(
        InputError,
        match=rf"ema\.safetensors: .*{file.stat().st_size} bytes, and {file.stat().st_size + 4}",
    ):
        Checkpoint.open(tmp_path).tensors("ema")
    file.unlink()
    with pytest.raises(InputError, match=r"ema\.safetensors: missing"):
        Checkpoint.open(tmp_path).tensors("ema")


def test_one_before_that_is_damaged_too_is_not_offered(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path, step, keep=9) for step in (1, 2, 3))
    for folder in (second, third):
        (folder / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=f"{third}.*{first}"):
        Checkpoint.open(tmp_path).tensors("ema")


def test_the_newest_of_those_that_are_intact_is_offered(tmp_path: Path) -> None:
    first, second, third = (save(tmp_path, step, keep=9) for step in (1, 2, 3))
    (third / "ema.safetensors").unlink()
    with pytest.raises(InputError, match=f"{third}.*; {second} is intact") as caught:
        Checkpoint.open(tmp_path).tensors("ema")
    assert str(first) not in str(caught.value)


def test_part_that_the_stage_has_not(tmp_path: Path) -> None:
    meta = Meta(stage="r2id", step=1, samples=8, seed=0, config={}, model={})
    folder = writing.save(tmp_path, state(1), meta, keep=1)
    with pytest.raises(InputError, match=r"stats\.safetensors"):
        Checkpoint.open(folder).tensors("stats")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ('{"format_version": 1}', "format_version 1.*2"),
        ('{"format_version": 2}', "damaged"),
        ("{}", "format_version None"),
    ],
)
def test_description_that_is_no_description(tmp_path: Path, text: str, message: str) -> None:
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    (newer / "checkpoint.json").write_text(text)
    with pytest.raises(InputError, match=f"{message}.*{older}"):
        Checkpoint.open(tmp_path)


def test_description_names_every_file_and_tensor(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    fact = json.loads((folder / "checkpoint.json").read_text())["files"]["model.safetensors"]
    assert (
        len(fact["sha256"]) == 64 and fact["bytes"] == (folder / "model.safetensors").stat().st_size
    )
    assert fact["tensors"]["layer.weight"] == {"shape": [2, 3], "dtype": "float32", "part": None}


def test_a_rank_s_file_that_is_not_named_is_missed(tmp_path: Path) -> None:
    """All bytes that are named are as they were saved, and still a part of a tensor is missing."""
    run = tmp_path / "run"
    ranks_save(run, 3)
    folder = reading.find_checkpoint(run)
    files = {
        name: fact
        for name, fact in Checkpoint(folder).files.items()
        if name != "model-00002-of-00002.safetensors"
    }
    meta = Checkpoint.open(folder).meta
    write_description(folder, meta, files)
    with pytest.raises(InputError, match=r"model layer\.weight"):
        Checkpoint.open(folder).tensors("ema")


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=str(path)):
            Checkpoint.open(path)


def test_weights_of_another_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(save(tmp_path, 1))
    model = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    with pytest.raises(InputError, match=r"step-00000001.*counts"):
        checkpoint.load_ema(model)
    model.register_buffer("counts", torch.zeros(1))
    checkpoint.load_ema(model.bfloat16())  # what is loaded is exact all the same
    torch.testing.assert_close(dict(model.state_dict()), checkpoint.tensors("ema"), rtol=0, atol=0)


def test_state_of_another_model(tmp_path: Path) -> None:
    engine = job.make("local", 0, job.ALONE)
    with pytest.raises(InputError, match=r"step-00000001: has no .*another model"):
        reading.resume(save(tmp_path, 1), engine.check, engine.load)
    job.save(tmp_path, engine.state())  # step 0, before the other one
    with pytest.raises(InputError, match=r"step-00000001: has no .*step-00000000"):
        reading.resume(tmp_path, engine.check, engine.load)


def test_tensors_that_do_not_fit_the_config(tmp_path: Path) -> None:
    """A whole checkpoint, well-formed to the last hash, of which one tensor has another shape."""
    engine = job.make("local", 0, job.ALONE)
    job.save(tmp_path, engine.state())
    job.run(engine, 0, 1, job.ALONE)
    job.save(tmp_path, engine.state())
    newest = reading.find_checkpoint(tmp_path)
    opened, parts = Checkpoint(newest), dict(engine.state().parts["model"])
    name = min(parts)
    parts[name] = type(parts[name])(torch.zeros(3, 5), (3, 5))
    write_description(newest, opened.meta, opened.files | write_part(newest, "model", parts, 0, 1))
    assert not reading.find_damages(newest)
    other = job.make("local", 0, job.ALONE)
    with pytest.raises(InputError, match=rf"{name} has shape \(3, 5\), .*step-00000000"):
        reading.resume(tmp_path, other.check, other.load)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """A pickle in the place of a file is refused, hash or no hash."""
    folder = save(tmp_path, 1)
    torch.save({"layer.weight": torch.zeros(2, 3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        Checkpoint.open(folder).tensors("model")
    save_file({"layer.weight": torch.zeros(2, 3)}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        Checkpoint.open(folder).tensors("model")
