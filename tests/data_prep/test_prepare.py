import os
import signal
import subprocess
import sys
import time

import pytest

from data_prep.plan import plan_shards
from data_prep.prepare import finish, make_plan, pending, write_shard
from data_prep.readers import reopen_reader
from r2id.config import PrepareConfig
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import files_of, make, write_images, write_mnist

SMALL = {"shard_mb": 0.1}


@pytest.fixture
def source(tmp_path):
    write_mnist(tmp_path / "source", train=200, test=50)
    return tmp_path / "source"


def test_the_same_bytes_from_one_worker_and_from_two(source, tmp_path):
    one = make("mnist", tmp_path / "one", source, **SMALL)
    make("mnist", tmp_path / "two", source, workers=2, **SMALL)
    assert len(one.split("train").files) > 3
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_shards_are_as_small_as_asked(source, tmp_path):
    shards = make("mnist", tmp_path / "set", source, **SMALL)
    sizes = [path.stat().st_size for path in shards.split("train").files]
    assert max(sizes) <= 1e5 and min(sizes[:-1]) > 4e4


def test_shards_are_fair_samples(source, tmp_path):
    shards = make("mnist", tmp_path / "set", source, **SMALL)
    split = shards.split("train")
    numbers = [int(split.key(index).split("-")[1]) for index in split.in_shard(0)]
    assert max(numbers) > 150 and min(numbers) < 50


def test_a_finished_set_is_left_alone_even_without_its_source(source, tmp_path):
    make("mnist", tmp_path / "set", source, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    make("mnist", tmp_path / "set", source, workers=2, **SMALL)
    source.rename(tmp_path / "moved")
    make("mnist", tmp_path / "set", source, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before


def test_the_steps_that_an_orchestrator_takes(source, tmp_path):
    config = PrepareConfig(dataset="mnist", source=source, out=tmp_path / "set", **SMALL)
    plan = make_plan(config)
    assert pending(plan) == list(range(len(plan.files))) and sum(plan.samples) == 250
    with pytest.raises(WorkError, match="not written"):
        finish(plan)
    results = [write_shard(plan, number) for number in reversed(pending(plan))]
    assert sum(result["samples"] for result in results) == 250 and not any(result["rejects"] for result in results)
    finish(plan)
    assert pending(make_plan(config)) == []
    make("mnist", tmp_path / "other", source, **SMALL)
    assert files_of(tmp_path / "set") == files_of(tmp_path / "other")


def test_what_was_damaged_or_lost_is_written_again(source, tmp_path):
    shards = make("mnist", tmp_path / "set", source, **SMALL)
    whole = files_of(tmp_path / "set")
    shards.split("train").files[1].unlink()
    shards.split("train").files[0].write_bytes(b"cut")
    (tmp_path / "set/test/shard-000000.parquet").unlink()
    (tmp_path / "set/train/shard-000002.tar.77.tmp").write_bytes(b"left by a killed worker")
    make("mnist", tmp_path / "set", source, **SMALL)
    assert files_of(tmp_path / "set") == whole


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(source, tmp_path):
    """SIGKILL at four places, from the first file of the plan on; then a run that is left to finish."""
    make("mnist", tmp_path / "whole", source, **SMALL)
    out = tmp_path / "set"
    command = [sys.executable, "-m", "r2id.cli", "prepare", "mnist", "--source", str(source), "--out", str(out),
               "--shard-mb", "0.1"]
    for files in (1, 3, 9, 20):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.rglob("*"))) < files:
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    make("mnist", out, source, **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize("change", [{"shard_mb": 0.2}, {"dataset": "folder"}])
def test_other_settings_need_another_folder(source, tmp_path, change):
    make("mnist", tmp_path / "set", source, **SMALL)
    with pytest.raises(InputError, match=f"was made with {next(iter(change))} = "):
        make(**{"dataset": "mnist", "out": tmp_path / "set", "source": source, **SMALL, **change})


def test_another_source_needs_another_folder(source, tmp_path):
    make("mnist", tmp_path / "set", source, **SMALL)
    write_mnist(tmp_path / "more", train=201)
    with pytest.raises(InputError, match="another source"):
        make("mnist", tmp_path / "set", tmp_path / "more", **SMALL)


def test_an_output_that_holds_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"holds something else \(thesis\.tex\)"):
        make("mnist", tmp_path / "set", source)
    assert files_of(tmp_path / "set") == {"thesis.tex": b"precious"}
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is no folder"):
        make("mnist", tmp_path / "file", source)
    (tmp_path / "empty").mkdir()
    make("mnist", tmp_path / "empty", source)


def test_a_damaged_plan_is_named(source, tmp_path):
    make("mnist", tmp_path / "set", source)
    (tmp_path / "set/plan.json").write_text("{")
    with pytest.raises(InputError, match=r"plan\.json: damaged"):
        make("mnist", tmp_path / "set", source)


def test_a_source_that_changes_after_the_plan(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(4)])
    plan = make_plan(PrepareConfig(dataset="folder", source=tmp_path / "in", out=tmp_path / "set"))
    reopen_reader("folder", tmp_path / "in", plan.downloads, plan.source_digest)
    (tmp_path / "in/2.png").write_bytes(b"another length")
    with pytest.raises(WorkError, match=r"2\.png: changed"):
        write_shard(plan, 0)
    reopen_reader.cache_clear()
    with pytest.raises(WorkError, match="changed since"):
        write_shard(plan, 0)
    assert not list((tmp_path / "set").rglob("*.tar*"))
    (tmp_path / "in/2.png").unlink()
    with pytest.raises(InputError, match="another source"):
        make_plan(plan.config)


def test_a_full_disk_is_said_and_a_rerun_goes_on(source, tmp_path):
    """A limit on the size of files stands in for the disk's end: the write fails in the same place."""
    command = f"ulimit -f 40; exec {sys.executable} -m r2id.cli prepare mnist --source {source} --out {tmp_path / 'set'}"
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; {command}"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    make("mnist", tmp_path / "set", source)


def test_one_image_larger_than_a_shard_gets_its_own(source):
    from data_prep.base import Item

    items = [Item(f"k{number}", "train", None, str(number), size) for number, size in enumerate([10, 10**6, 10, 10])]
    assert sorted(len(group) for _, group in plan_shards(items, 0.1))[0] == 1
