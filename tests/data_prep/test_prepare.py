"""Preparing a shard set: the same bytes from any number of processes, after any kill."""

import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from data_prep.items import ItemTableBuilder
from data_prep.prepare import finish, make_shard_plan, pending_shards, prepare, write_shard
from data_prep.shard_plan import _footer, plan_shards
from r2id.config import PrepareConfig
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import files_of, make, write_images, write_mnist
from tests.forked import FORKED
from tests.waiting import wait_until

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
    numbers = [int(split.key(index).split("-")[1]) for index in split.indices_in_shard(0)]
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
    plan = make_shard_plan(config)
    assert pending_shards(plan) == list(range(len(plan.files))) and sum(plan.samples) == 250
    with pytest.raises(WorkError, match="not written"):
        finish(plan)
    results = [write_shard(plan, number) for number in reversed(pending_shards(plan))]
    assert sum(result["samples"] for result in results) == 250 and not any(
        result["rejects"] for result in results
    )
    finish(plan)
    assert pending_shards(make_shard_plan(config)) == []
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


def prepare_until(config, moment, count):
    """Prepare, and end by SIGKILL at the given number of a file operation.

    The interpreter's audit events (open, rename, remove, …) are counted in ``count``.
    """

    def watch(event, _arguments):
        if event.split(".")[0] in ("open", "os", "pathlib", "tempfile", "shutil"):
            count.value += 1
            if count.value == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    prepare(config)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path):
    """SIGKILL at 20 random moments of the work."""
    source = tmp_path / "source"
    write_mnist(source, train=100, test=30)
    config = PrepareConfig(dataset="mnist", source=source, out=tmp_path / "whole", **SMALL)

    def run(out, moment=None):
        count = FORKED.Value("q", 0)
        process = FORKED.Process(
            target=prepare_until, args=(config.model_copy(update={"out": out}), moment, count)
        )
        process.start()
        process.join()
        return process.exitcode, count.value

    code, total = run(tmp_path / "whole")
    assert code == 0 and total > 100
    whole, stages = files_of(tmp_path / "whole"), set()
    for number, moment in enumerate(np.random.default_rng(0).choice(total, 20, replace=False) + 1):
        out = tmp_path / f"set{number}"
        assert run(out, int(moment))[0] == -signal.SIGKILL
        stages.add(len(list(out.rglob("*.*"))))
        prepare(config.model_copy(update={"out": out}))
        assert files_of(out) == whole, f"killed at moment {moment} of {total}"
    assert len(stages) > 4, "they fell into different stages of the work"


@pytest.mark.slow
def test_killed_while_several_processes_write(source, tmp_path):
    make("mnist", tmp_path / "whole", source, **SMALL)
    out = tmp_path / "set"
    command = [
        sys.executable,
        "-m",
        "r2id.cli",
        "prepare",
        "mnist",
        "--source",
        str(source),
        "--out",
        str(out),
        "--shard-mb",
        "0.1",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    wait_until(lambda: len(list(out.rglob("*.tar"))) >= 2, alive=process, every=0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    make("mnist", out, source, workers=5, **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.parametrize(
    "change", [{"shard_mb": 0.2}, {"dataset": "folder"}, {"max_megapixels": 1.0}]
)
def test_other_settings_need_another_folder(source, tmp_path, change):
    make("mnist", tmp_path / "set", source, **SMALL)
    with pytest.raises(InputError, match=f"{next(iter(change))} = "):
        make(**{"dataset": "mnist", "out": tmp_path / "set", "source": source, **SMALL, **change})


def test_another_source_needs_another_folder(source, tmp_path):
    make("mnist", tmp_path / "set", source, **SMALL)
    write_mnist(tmp_path / "more", train=201)
    with pytest.raises(InputError, match="another source"):
        make("mnist", tmp_path / "set", tmp_path / "more", **SMALL)


def test_an_output_that_holds_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"thesis\.tex"):
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
    with pytest.raises(InputError, match=r"plan\.json"):
        make("mnist", tmp_path / "set", source)


@pytest.mark.parametrize("content", [b"another length", None])
def test_a_source_that_changes_after_the_plan(tmp_path, content):
    """Also when the length stays the same."""
    write_images(tmp_path / "in", [f"{number}.png" for number in range(4)])
    plan = make_shard_plan(
        PrepareConfig(dataset="folder", source=tmp_path / "in", out=tmp_path / "set")
    )
    (tmp_path / "in/2.png").write_bytes(content or (tmp_path / "in/3.png").read_bytes())
    with pytest.raises(WorkError, match=r"2\.png"):
        write_shard(plan, 0)
    (tmp_path / "in/2.png").unlink()
    with pytest.raises(WorkError, match=r"2\.png"):
        write_shard(plan, 0)
    assert not list((tmp_path / "set").rglob("*.tar*"))
    with pytest.raises(InputError, match="another source"):
        make_shard_plan(plan.config)


def test_a_full_disk_is_said_and_a_rerun_goes_on(source, tmp_path):
    """A disk of 100 kB, where it may be mounted, and always a limit on the size of files."""
    out = tmp_path / "disk" / "set"
    out.parent.mkdir()
    prepare_it = (
        f"{sys.executable} -m r2id.cli prepare mnist --source {source} --out {out} --shard-mb 0.1"
    )
    mounted = (
        f"mount -t tmpfs -o size=100k none {out.parent} && {prepare_it}; "
        f"echo $? > {tmp_path / 'code'}; ls -R {out}"
    )
    done = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", mounted], capture_output=True, text=True
    )
    if (tmp_path / "code").exists():
        assert (tmp_path / "code").read_text() == "1\n" and ".tmp" not in done.stdout
        assert "No space left" in done.stderr.splitlines()[-1]
    limited = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; ulimit -f 40; exec {prepare_it}"],
        capture_output=True,
        text=True,
    )
    assert limited.returncode == 1, limited.stderr
    assert "File too large" in limited.stderr.splitlines()[-1] and "Traceback" not in limited.stderr
    make("mnist", out, source, **SMALL)
    make("mnist", tmp_path / "whole", source, **SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def items_of(sizes, blocks=None):
    items = ItemTableBuilder()
    for number, size in enumerate(sizes):
        items.add("train", None, b"%d" % number, size, blocks[number] if blocks else -1)
    return items.table()


def test_one_image_larger_than_a_shard_gets_its_own():
    assert min(len(rows) for _, rows in plan_shards(items_of([10, 10**6, 10, 10]), 0.1)) == 1


def test_blocks_stay_together_in_an_order_of_their_own():
    blocks = [number // 10 for number in range(1000)]
    shards = plan_shards(items_of([10] * 1000, blocks), 0.1)
    order = np.concatenate([rows for _, rows in shards])
    seen = [blocks[row] for row in order]
    changes = [
        block for position, block in enumerate(seen) if not position or seen[position - 1] != block
    ]
    assert sorted(changes) == list(range(100)) != changes
    assert any(
        list(order[start : start + 10]) != sorted(order[start : start + 10])
        for start in range(0, 1000, 10)
    )
    assert sorted(order) == list(range(1000))


def test_the_footer_of_a_plan_is_parsed_once(tmp_path):
    def plan_of(source):
        write_images(source, [f"{number}.png" for number in range(60)])
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        config = PrepareConfig(dataset="folder", source=source, out=tmp_path / "set", shard_mb=0.03)
        return make_shard_plan(config)

    def places(plan):
        return {item.place for number in range(len(plan.files)) for item in plan.items(number)}

    plan, before = plan_of(tmp_path / "in"), _footer.cache_info().misses
    assert len(plan.files) > 5
    assert places(plan) == {b"%d.png" % number for number in range(60)}
    assert _footer.cache_info().misses == before + 1
    (tmp_path / "in/x.png").write_bytes((tmp_path / "in/0.png").read_bytes())
    assert b"x.png" in places(plan_of(tmp_path / "in"))


def test_items_kept_in_columns(monkeypatch):
    monkeypatch.setattr("data_prep.items._CHUNK", 7)
    table = items_of(range(20))
    assert table["size"].to_pylist() == list(range(20))
    assert table["key"].to_pylist()[19] == "train-00000019"


@pytest.mark.parametrize(
    ("dataset", "option"),
    [
        ("mnist", {"labels": "x.csv"}),
        ("folder", {"label": "identity"}),
        ("imagenet", {"images": "wild"}),
    ],
)
def test_an_option_that_the_dataset_does_not_take(tmp_path, dataset, option):
    with pytest.raises(InputError, match=f"{next(iter(option))} = .*{dataset!r}"):
        make(dataset, tmp_path / "set", tmp_path, **option)


def test_the_failure_budget_is_an_option(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(20)])
    for number in range(11):
        (tmp_path / f"in/text{number}.jpg").write_text("no picture")
    with pytest.raises(WorkError, match=r"\(10, .*max_rejects = 0\.2\), such as"):
        make("folder", tmp_path / "set", tmp_path / "in", max_rejects=0.2)
    assert make("folder", tmp_path / "set", tmp_path / "in", max_rejects=0.5).manifest.rejects == 11


def test_ten_images_of_any_source_may_be_unusable(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(10)])
    for number in range(10):
        (tmp_path / f"in/text{number}.jpg").write_text("no picture")
    assert make("folder", tmp_path / "set", tmp_path / "in", max_rejects=0).manifest.rejects == 10


def test_rejects_of_the_listing_count_while_shards_are_written(tmp_path):
    """Too many are noticed before all is written, though neither kind is too many alone."""
    write_images(tmp_path / "in", [f"{number}.png" for number in range(60)])
    for number in range(6):
        (tmp_path / f"in/link{number}.png").symlink_to("nowhere")
    config = PrepareConfig(
        dataset="folder", source=tmp_path / "in", out=tmp_path / "set", shard_mb=0.05
    )
    plan = make_shard_plan(config)
    assert len(plan.rejects) == 6 and len(plan.files) > 3
    for item in plan.items(0)[:5]:
        path = tmp_path / "in" / os.fsdecode(item.place)
        path.write_bytes(bytes(item.size))
    shutil.rmtree(config.out)
    with pytest.raises(WorkError, match=r"source .*: 11 of 66 images cannot be used"):
        prepare(config)
    assert (config.out / plan.files[0]).exists() and not (config.out / plan.files[-1]).exists()


def test_no_more_pixels_are_taken_than_are_read_later(tmp_path):
    PrepareConfig(dataset="folder", out=tmp_path, max_megapixels=400)
    with pytest.raises(ValueError, match=r"max_megapixels\n.* less than or equal to 400"):
        PrepareConfig(dataset="folder", out=tmp_path, max_megapixels=400.1)


def test_images_of_too_many_pixels_are_rejected(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(5)])
    write_images(tmp_path / "in", ["large.png"], size=(200, 200))
    shards = make("folder", tmp_path / "set", tmp_path / "in", max_megapixels=0.01)
    assert shards.manifest.rejects == 1
    assert (
        'large.png,"an image of 200x200 pixels, more than'
        in (tmp_path / "set/rejects.csv").read_text()
    )
