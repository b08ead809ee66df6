"""Every kind of damage: found, and repaired to the same bytes."""

import itertools
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import typer

from data_prep.repair import repair
from r2id.cli import data as cli
from r2id.data.manifest import Manifest
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from r2id.files import exclusive
from tests.data_prep.conftest import files_of, make, write_images

FIRST, SECOND = "train/shard-000000.tar", "train/shard-000001.tar"


@pytest.fixture
def out(tmp_path):
    write_images(
        tmp_path / "source", [f"{label}/{number}.png" for label in "ab" for number in range(60)]
    )
    (tmp_path / "source/a/text.png").write_text("no picture")
    make("folder", tmp_path / "set", tmp_path / "source", shard_mb=0.1)
    assert len(list((tmp_path / "set").rglob("*.tar"))) > 3
    return tmp_path / "set"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def member(path, number):
    with tarfile.open(path) as archive:
        return archive.getmembers()[number]


def edit_manifest(out):
    text = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text(text.replace('"a"', '"c"', 1))


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def duplicate(out):
    """A shard has another's content, index and manifest agree: only the repeated keys reveal it."""
    shutil.copy(out / FIRST, out / SECOND)
    shutil.copy((out / FIRST).with_suffix(".parquet"), (out / SECOND).with_suffix(".parquet"))
    manifest = Manifest.model_validate(json.loads((out / "manifest.json").read_bytes()))
    shards = manifest.splits["train"].shards
    shards[1] = shards[0].model_copy(update={"file": SECOND})
    split = manifest.splits["train"].model_copy(
        update={"samples": sum(entry.samples for entry in shards)}
    )
    manifest.model_copy(update={"splits": {**manifest.splits, "train": split}}).write(out)


DAMAGES = {
    "a bit of an image": (
        lambda out: flip(out / FIRST, member(out / FIRST, 2).offset_data + 40),
        [FIRST],
    ),
    "a bit of a header": (
        lambda out: flip(out / FIRST, member(out / FIRST, 4).offset + 3),
        [FIRST],
    ),
    "a bit of a label": (
        lambda out: flip(out / FIRST, member(out / FIRST, 0).offset_data),
        [FIRST],
    ),
    "cut in a member": (
        lambda out: truncate(out / FIRST, member(out / FIRST, 5).offset_data + 10),
        [FIRST],
    ),
    "cut between members": (
        lambda out: truncate(out / FIRST, member(out / FIRST, 6).offset),
        [FIRST],
    ),
    "emptied": (lambda out: truncate(out / FIRST, 0), [FIRST]),
    "a shard missing": (lambda out: (out / SECOND).unlink(), [SECOND]),
    "an index missing": (lambda out: (out / SECOND).with_suffix(".parquet").unlink(), [SECOND]),
    "an index damaged": (lambda out: flip((out / FIRST).with_suffix(".parquet"), 200), [FIRST]),
    "an index cut": (lambda out: truncate((out / FIRST).with_suffix(".parquet"), 100), [FIRST]),
    "a shard too many": (
        lambda out: shutil.copy(out / FIRST, out / "train/shard-000099.tar"),
        ["train/shard-000099.tar"],
    ),
    "an edited manifest": (edit_manifest, ["manifest.json"]),
    "a manifest cut short": (lambda out: truncate(out / "manifest.json", 300), ["manifest.json"]),
    "duplicate keys": (duplicate, None),
    "rejects missing": (lambda out: (out / "rejects.csv").unlink(), ["rejects.csv"]),
    "rejects edited": (
        lambda out: (out / "rejects.csv").write_text("split,source,reason\n"),
        ["rejects.csv"],
    ),
    "a manifest and a shard": (
        lambda out: [edit_manifest(out), truncate(out / FIRST, 99)],
        [FIRST, "manifest.json"],
    ),
    "two shards": (
        lambda out: [truncate(out / FIRST, 99), (out / SECOND).unlink()],
        [FIRST, SECOND],
    ),
}


@pytest.mark.parametrize(("damage", "files"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_found_and_repaired(out, damage, files):
    assert verify(out) == []
    whole, times = files_of(out), {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    damage(out)
    damages = verify(out)
    assert damages
    repaired = repair(out, damages)
    assert verify(out) == [] and files_of(out) == whole
    if files is not None:
        assert list(repaired) == files
        untouched = {
            path: time
            for path, time in times.items()
            if path.relative_to(out).as_posix() not in files
        }
        assert {path: path.stat().st_mtime_ns for path in untouched} == untouched, (
            "only the damaged shards were rebuilt"
        )


def test_the_source_may_have_moved(out, tmp_path):
    whole = files_of(out)
    (tmp_path / "source").rename(tmp_path / "moved")
    (out / FIRST).unlink()
    with pytest.raises(InputError, match="--source"):
        repair(out, verify(out))
    repair(out, verify(out), tmp_path / "moved")
    assert files_of(out) == whole


def test_what_cannot_be_repaired_says_why(out, tmp_path):
    (out / FIRST).unlink()
    (tmp_path / "source/a/new.png").write_bytes((tmp_path / "source/a/1.png").read_bytes())
    with pytest.raises(InputError, match=f"{out}: .*another source"):
        repair(out, verify(out))
    (tmp_path / "source/a/new.png").unlink()
    flip(out / "plan.parquet", 100)
    with pytest.raises(InputError, match=r"plan\.json"):
        repair(out, verify(out))


def test_rejects_that_do_not_belong(tmp_path):
    write_images(tmp_path / "source", [f"{number}.png" for number in range(6)])
    make("folder", tmp_path / "set", tmp_path / "source")
    whole = files_of(tmp_path / "set")
    (tmp_path / "set/rejects.csv").write_text("split,source,reason\n")
    assert repair(tmp_path / "set", verify(tmp_path / "set")) == {"rejects.csv": "rewritten"}
    assert files_of(tmp_path / "set") == whole and verify(tmp_path / "set") == []


def test_a_source_that_gives_other_bytes_is_not_taken(out, tmp_path):
    """Names and lengths are the same, so that the plan fits."""
    paths = sorted((tmp_path / "source").rglob("*.png"), key=lambda path: path.stat().st_size)
    for _, alike in itertools.groupby(paths, key=lambda path: path.stat().st_size):
        files = list(alike)
        contents = [path.read_bytes() for path in files]
        for path, content in zip(files, [*contents[1:], contents[0]], strict=True):
            path.write_bytes(content)
    manifest = (out / "manifest.json").read_bytes()
    (out / FIRST).unlink()
    with pytest.raises(WorkError, match=r"shard-000000\.tar"):
        repair(out, verify(out))
    assert (out / "manifest.json").read_bytes() == manifest and not (out / FIRST).exists()


def test_labels_given_by_a_relative_path(tmp_path, monkeypatch):
    write_images(tmp_path / "source", [f"{number}.png" for number in range(6)])
    (tmp_path / "labels.csv").write_text(
        "file,class\n" + "".join(f"{number}.png,{number % 2}\n" for number in range(6))
    )
    monkeypatch.chdir(tmp_path)
    make("folder", tmp_path / "set", Path("source"), labels=Path("labels.csv"))
    whole = files_of(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "set" / FIRST).unlink()
    repair(tmp_path / "set", verify(tmp_path / "set"))
    assert files_of(tmp_path / "set") == whole


def test_labels_that_have_moved_with_the_source(tmp_path):
    write_images(tmp_path / "source", [f"{number}.png" for number in range(6)])
    table = tmp_path / "source/tables/labels.csv"
    table.parent.mkdir()
    table.write_text("file,class\n" + "".join(f"{n}.png,{n % 2}\n" for n in range(6)))
    make("folder", tmp_path / "set", tmp_path / "source", labels=table)
    whole = files_of(tmp_path / "set")
    (tmp_path / "source").rename(tmp_path / "moved")
    (tmp_path / "set" / FIRST).unlink()
    repair(tmp_path / "set", verify(tmp_path / "set"), tmp_path / "moved")
    assert files_of(tmp_path / "set") == whole
    (tmp_path / "moved/tables/labels.csv").unlink()
    (tmp_path / "set" / FIRST).unlink()
    with pytest.raises(InputError, match=r"/moved/tables/labels\.csv: no such file$"):
        repair(tmp_path / "set", verify(tmp_path / "set"), tmp_path / "moved")


def test_nothing_outside_the_set_is_touched(out, tmp_path):
    """Whatever an edited manifest names."""
    make("folder", tmp_path / "precious", tmp_path / "source")
    flip(tmp_path / "precious" / FIRST, 600)
    before = files_of(tmp_path / "precious")
    text = (out / "manifest.json").read_text().replace(f'"{FIRST}"', f'"../precious/{FIRST}"')
    (out / "manifest.json").write_text(text)
    repair(out, verify(out))
    assert verify(out) == [] and files_of(tmp_path / "precious") == before


def test_the_command(out, tmp_path, capsys):
    whole = files_of(out)
    (out / FIRST).unlink()
    shutil.copy(out / SECOND, out / "train/shard-000099.tar")
    with pytest.raises(typer.Exit) as caught:
        cli.verify(out)
    assert caught.value.exit_code == 1
    assert capsys.readouterr().out.splitlines() == [
        "train/shard-000099.tar: not in the manifest",
        f"{FIRST}: missing",
    ]
    cli.verify(out, repair=True)
    assert capsys.readouterr().out.splitlines() == [
        f"{FIRST}: rebuilt",
        "train/shard-000099.tar: removed",
        f"{out}: 120 images intact",
    ]
    assert files_of(out) == whole
    with pytest.raises(InputError, match="--repair"):
        cli.verify(out, source=tmp_path / "source")


def test_one_process_repairs(out):
    flip(out / FIRST, 600)
    before = files_of(out)
    with exclusive(out), pytest.raises(WorkError, match="another process is at work"):
        repair(out, verify(out))
    assert files_of(out) == before
    repair(out, verify(out))
    assert not verify(out)
