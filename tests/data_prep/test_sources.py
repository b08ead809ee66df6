"""Folders, tars and zips of images as people have them, with all that can be wrong with one."""

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.prepare import make_shard_plan, write_shard
from r2id.config import PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import make, prepare_as_nobody, write_images
from tests.forked import FORKED


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


NAMES = [
    f"pets/{split}/{label}/{number}.png"
    for split in ("train", "test")
    for label in ("cat", "dog")
    for number in range(9)
]
IMAGES = {name: picture(number) for number, name in enumerate(NAMES)}


def write_tar(path, members, mode="w", prefix="", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        archive.addfile(directory("pets"))
        for name, data in members.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def directory(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


ARCHIVES = {
    "tar": ("pets.tar", lambda path: write_tar(path, IMAGES)),
    "tar with ./": ("pets.tar", lambda path: write_tar(path, IMAGES, prefix="./")),
    "old tar": ("pets.tar", lambda path: write_tar(path, IMAGES, form=tarfile.GNU_FORMAT)),
    "tar.gz": ("pets.tar.gz", lambda path: write_tar(path, IMAGES, "w:gz")),
    "tar.xz": ("pets.tar.xz", lambda path: write_tar(path, IMAGES, "w:xz")),
    "tar.bz2": ("pets.tbz", lambda path: write_tar(path, IMAGES, "w:bz2")),
    "zip": ("pets.zip", lambda path: write_zip(path, IMAGES)),
}


@pytest.mark.parametrize(("name", "write"), ARCHIVES.values(), ids=ARCHIVES.keys())
def test_an_archive_is_like_its_folder(tmp_path, name, write):
    write(tmp_path / name)
    shards = make("folder", tmp_path / "set", tmp_path / name)
    assert verify(shards.folder) == [] and shards.class_names == ["cat", "dog"]
    assert shards.summary()["samples"] == {"test": 18, "train": 18}
    stored = sorted(
        split.read(index) for split in map(shards.split, ("train", "test")) for index in range(18)
    )
    assert stored == sorted(IMAGES.values())
    assert not (tmp_path / "set/source").exists(), "what was decompressed is removed"
    assert make("folder", tmp_path / "set", tmp_path / name).digest == shards.digest
    assert not (tmp_path / "set/source").exists(), "also when it was only looked at again"


def rejected(out):
    with (out / "rejects.csv").open(newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


def link(name, target, kind=tarfile.SYMTYPE):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_dangerous_members_become_rows_and_are_written_nowhere(tmp_path):
    with tarfile.open(tmp_path / "pets.tar", "w") as archive:
        for name in (
            "a/1.png",
            "a/2.png",
            "../../out.png",
            "/abs.png",
            "a/../../up.png",
            "a/1.png",
            "a/nul\0x.png",
        ):
            info = tarfile.TarInfo(name)
            info.size = len(picture(1))
            if "\0" in name:
                info.name, info.pax_headers = "a/nul.png", {"path": name}
            archive.addfile(info, io.BytesIO(picture(1)))
        for info in (
            link("a/soft.png", "/etc/passwd"),
            link("a/hard.png", "a/1.png", tarfile.LNKTYPE),
        ):
            archive.addfile(info)
        fifo = tarfile.TarInfo("a/fifo.png")
        fifo.type = tarfile.FIFOTYPE
        archive.addfile(fifo)
    before = set(tmp_path.parent.iterdir())
    shards = make("folder", tmp_path / "set", tmp_path / "pets.tar")
    assert set(tmp_path.parent.iterdir()) == before and {
        path.name for path in tmp_path.iterdir()
    } == {"pets.tar", "set"}
    assert {path.suffix for path in (tmp_path / "set").rglob("*.*")} == {
        ".tar",
        ".parquet",
        ".json",
        ".csv",
    }
    assert sum(shards.summary()["samples"].values()) == 2 and verify(shards.folder) == []
    assert rejected(tmp_path / "set") == {
        "../../out.png": "its name leads out of the archive",
        "/abs.png": "its name leads out of the archive",
        "a/../../up.png": "its name leads out of the archive",
        "a/1.png": "twice in the archive",
        b"a/nul\0x.png".decode(): "its name holds a NUL",
        "a/soft.png": "a link",
        "a/hard.png": "a link",
        "a/fifo.png": "no regular file",
    }


def test_dangerous_members_of_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as archive:
        for name in ("a/1.png", "../out.png", "/abs.png"):
            archive.writestr(name, picture(1))
        info = zipfile.ZipInfo("a/soft.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/1.png", picture(2))
    make("folder", tmp_path / "set", tmp_path / "pets.zip")
    assert rejected(tmp_path / "set") == {
        "../out.png": "its name leads out of the archive",
        "a/soft.png": "a link",
        "/abs.png": "its name leads out of the archive",
        "a/1.png": "twice in the archive",
    }


def test_a_member_that_expands_beyond_what_is_stated(tmp_path):
    """A zip whose directory says 100 bytes of what expands to 50 MB, and one that says so."""
    bomb = bytes(50_000_000)
    write_zip(
        tmp_path / "pets.zip", {"a/1.png": picture(1), "a/bomb.png": bomb, "a/2.png": picture(2)}
    )
    shards = make("folder", tmp_path / "one", tmp_path / "pets.zip", max_megapixels=1)
    assert rejected(tmp_path / "one") == {
        "a/bomb.png": "50000000 bytes, more than an image of the pixels allowed can have (16000000)"
    }
    data = (tmp_path / "pets.zip").read_bytes()
    (tmp_path / "lies.zip").write_bytes(
        data.replace((50_000_000).to_bytes(4, "little"), (100).to_bytes(4, "little"))
    )
    shards = make("folder", tmp_path / "two", tmp_path / "lies.zip", max_megapixels=1)
    assert (
        list(rejected(tmp_path / "two")) == ["a/bomb.png"]
        and sum(shards.summary()["samples"].values()) == 2
    )


def test_a_png_that_would_fill_the_memory(tmp_path):
    write_images(tmp_path / "in", ["1.png"])
    huge = io.BytesIO()
    Image.new("1", (30000, 30000)).save(huge, "PNG")
    (tmp_path / "in/huge.png").write_bytes(huge.getvalue())
    assert len(huge.getvalue()) < 1_000_000
    make("folder", tmp_path / "set", tmp_path / "in")
    assert (
        "30000x30000 pixels, more than the 100000000 allowed"
        in rejected(tmp_path / "set")["huge.png"]
    )


def cut(data):
    return data[: len(data) // 2 + 100]


def cut_between_members(path):
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[7].offset
    path.write_bytes(path.read_bytes()[:offset])


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


def header_of(path, number):
    with tarfile.open(path) as archive:
        return archive.getmembers()[number].offset


DAMAGED = {
    "cut": ("pets.tar", lambda path: path.write_bytes(cut(path.read_bytes()))),
    "cut between members": ("pets.tar", cut_between_members),
    "a bit of a header": ("pets.tar", lambda path: flip(path, header_of(path, 8) + 5)),
    "cut gz": ("pets.tar.gz", lambda path: path.write_bytes(cut(path.read_bytes()))),
    "a bit of the gz": ("pets.tar.gz", lambda path: flip(path, len(path.read_bytes()) // 2)),
    "cut xz": ("pets.tar.xz", lambda path: path.write_bytes(cut(path.read_bytes()))),
    "cut zip": ("pets.zip", lambda path: path.write_bytes(cut(path.read_bytes()))),
    "text": ("pets.tar", lambda path: path.write_text("this is no archive, " * 100)),
    "nothing": ("pets.tar", lambda path: path.write_bytes(b"")),
}


@pytest.mark.parametrize(("name", "damage"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_archives_are_refused_before_anything_is_written(tmp_path, name, damage):
    next(write for known, write in ARCHIVES.values() if known == name)(tmp_path / name)
    damage(tmp_path / name)
    with pytest.raises(
        InputError, match=r"truncated or damaged|a truncated or damaged one"
    ) as caught:
        make("folder", tmp_path / "set", tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "set/plan.json").exists()


def test_a_bit_in_a_zip_members_content_is_a_row(tmp_path):
    write_zip(tmp_path / "pets.zip", IMAGES)
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        info = archive.infolist()[4]
    flip(tmp_path / "pets.zip", info.header_offset + 30 + len(info.filename) + 20)
    make("folder", tmp_path / "set", tmp_path / "pets.zip")
    assert list(rejected(tmp_path / "set")) == [info.filename]


@pytest.mark.parametrize("name", ["pets.tar", "pets.zip"])
def test_an_archive_that_changes_after_the_plan(tmp_path, name):
    next(write for known, write in ARCHIVES.values() if known == name)(tmp_path / name)
    plan = make_shard_plan(
        PrepareConfig(dataset="folder", source=tmp_path / name, out=tmp_path / "set")
    )
    os.utime(tmp_path / name)
    with pytest.raises(WorkError, match="changed since the preparation began"):
        write_shard(plan, 0)
    (tmp_path / name).unlink()
    with pytest.raises((WorkError, InputError), match=r"gone since|no such file"):
        write_shard(plan, 0)


def test_an_older_archive_in_its_place(tmp_path):
    """Its time says nothing, and what it holds has the same lengths at the same places."""
    write_tar(tmp_path / "pets.tar", IMAGES)
    plan = make_shard_plan(
        PrepareConfig(dataset="folder", source=tmp_path / "pets.tar", out=tmp_path / "set")
    )
    write_tar(
        tmp_path / "older.tar", {name.replace("cat", "cow"): data for name, data in IMAGES.items()}
    )
    os.utime(tmp_path / "older.tar", (0, 0))
    (tmp_path / "older.tar").replace(tmp_path / "pets.tar")
    with pytest.raises(WorkError, match=r"pets\.tar: changed since the preparation began \(pets/"):
        write_shard(plan, 0)


def test_a_compressed_archive_that_changes_is_decompressed_again(tmp_path):
    """As after a killed run, which leaves the plain copy."""
    write_tar(tmp_path / "pets.tar.xz", IMAGES, "w:xz")
    config = PrepareConfig(dataset="folder", source=tmp_path / "pets.tar.xz", out=tmp_path / "set")
    make_shard_plan(config)
    others = {name.replace("/0.png", "/x.png"): data for name, data in IMAGES.items()}
    before = (tmp_path / "pets.tar.xz").stat()
    write_tar(tmp_path / "pets.tar.xz", others, "w:xz")
    assert abs((tmp_path / "pets.tar.xz").stat().st_size - before.st_size) < 100
    with pytest.raises(InputError, match="made from another source"):
        make_shard_plan(config)


def test_an_archive_that_expands_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tars._EXPANSION_FREE", 1 << 20)
    write_tar(tmp_path / "bomb.tar.gz", {"a/1.png": bytes(50_000_000)}, "w:gz")
    with pytest.raises(
        InputError, match=r"bomb\.tar\.gz: expands to more than \d+ bytes, 200 times its size"
    ):
        make("folder", tmp_path / "set", tmp_path / "bomb.tar.gz")
    assert not list((tmp_path / "set").rglob("*.*"))


def test_names_that_look_like_places(tmp_path):
    write_images(tmp_path / "in", ["12:34:photo.png", "5:photo.png"])
    (tmp_path / "in/1:2:text.png").write_text("no picture")
    split = make("folder", tmp_path / "set", tmp_path / "in").split("train")
    with tarfile.open(split.files[0]) as archive:
        facts = [
            archive.extractfile(member).read() for member in archive if member.name.endswith("json")
        ]
    assert {json.loads(fact)["source"] for fact in facts} == {"12:34:photo.png", "5:photo.png"}
    assert list(rejected(tmp_path / "set")) == ["1:2:text.png"]


def test_names_that_are_not_utf8(tmp_path):
    """A file may be called so, a class may not: its name is to be written down."""
    write_images(tmp_path / "in", ["a/1.png", "b/1.png", "b/2.png"])
    odd = os.fsdecode(b"caf\xe9")
    (tmp_path / "in/a/1.png").rename(tmp_path / f"in/a/{odd}.png")
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert verify(shards.folder) == [] and len(shards.split("train")) == 3
    (tmp_path / "in/a").rename(tmp_path / "in" / odd)
    with pytest.raises(InputError, match=r"class b'caf\\xe9': the name is not UTF-8"):
        make("folder", tmp_path / "other", tmp_path / "in")


def test_folders_and_files_without_permission(tmp_path):
    """In a process of another user, because the superuser may read everything."""
    if os.getuid():
        pytest.skip("another user can be had by root alone")
    write_images(tmp_path / "in", ["a/1.png", "a/2.png", "b/1.png", "b/2.png"])
    out = tmp_path / "out"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o755)

    def run(name):
        config = PrepareConfig(dataset="folder", source=tmp_path / "in", out=out / name)
        process = FORKED.Process(target=prepare_as_nobody, args=(config, tmp_path / "out/said"))
        process.start()
        process.join()
        assert process.exitcode == 0
        return (tmp_path / "out/said").read_text()

    (tmp_path / "in/b").chmod(0o444)
    assert run("none") == f"{tmp_path / 'in/b/1.png'}: cannot be listed: Permission denied"
    (tmp_path / "in/b").chmod(0o755)
    (tmp_path / "in/a/1.png").chmod(0)
    assert run("one") == "" and rejected(out / "one") == {
        "a/1.png": "cannot be read: Permission denied"
    }
    (tmp_path / "in/b").chmod(0)
    assert run("two") == f"{tmp_path / 'in/b'}: cannot be listed: Permission denied"
    assert not (out / "two").exists()


def test_what_lies_beside_the_images(tmp_path, capfd):
    write_images(tmp_path / "in", ["1.png", "2.png"])
    (tmp_path / "in/readme.txt").write_text("no image")
    (tmp_path / "in/._1.png").write_text("left by an archiver")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "in/pipe.png")
    make("folder", tmp_path / "set", tmp_path / "in")
    assert rejected(tmp_path / "set") == {
        "gone.png": "a link to nothing",
        "pipe.png": "no regular file",
    }
    assert (
        "2 other files left out, 2 images (train 2), 0 classes, 2 rejected so far"
        in capfd.readouterr().err
    )


TABLES = {
    "csv": lambda path, rows: write_csv(path.with_suffix(".csv"), rows),
    "parquet": lambda path, rows: pq.write_table(
        pa.Table.from_pylist(rows), path.with_suffix(".parquet")
    ),
}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("labels", [["ant", "bee"], [10, 9]])
def test_classes_from_a_table(tmp_path, kind, labels):
    names = [f"{number}.png" for number in range(20)]
    write_images(tmp_path / "in", names)
    rows = [
        {"filename": name, "label": labels[number % 2], "split": ("train", "val")[number % 5 == 0]}
        for number, name in enumerate(names)
    ]
    TABLES[kind](tmp_path / "labels", rows)
    shards = make("folder", tmp_path / "set", tmp_path / "in", labels=tmp_path / f"labels.{kind}")
    assert shards.class_names == sorted(map(str, labels), key=lambda name: (len(name), name))
    assert shards.summary()["samples"] == {"val": 4, "train": 16}
    split = shards.split("train")
    for index in range(len(split)):
        number = next(
            n for n in range(20) if (tmp_path / f"in/{n}.png").read_bytes() == split.read(index)
        )
        assert shards.class_names[split.label[index]] == str(labels[number % 2])


def test_a_table_and_images_that_do_not_fit(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(6)])
    good = [{"path": f"{number}.png", "class": number % 2} for number in range(6)]
    table = tmp_path / "labels.csv"

    def prepare(rows, out="set"):
        write_csv(table, rows)
        return make("folder", tmp_path / out, tmp_path / "in", labels=table)

    prepare([*good[1:], {"path": "./9.png", "class": 0}])
    assert rejected(tmp_path / "set") == {
        "0.png": "no label in labels.csv",
        "9.png": "in labels.csv, but there is no such image",
    }
    for rows, words in (
        ([*good, good[2]], "line 8: '2.png' for a second time"),
        ([*good, {"path": "6.png", "class": ""}], "line 8: no label for '6.png'"),
        ([{"path": "in/1.png", "class": 1}], "names none of the 6 images"),
        ([{"path": "1.png", "kind": 1}], "no column 'label' or 'class' or 'target'"),
        ([{"x": "1.png", "class": 1}], "no column 'path' or"),
    ):
        with pytest.raises(InputError, match=words):
            prepare(rows, "other")
    table.write_text("path,label\n1.png,1,2\n")
    with pytest.raises(InputError, match="line 2: 3 columns, not 2"):
        make("folder", tmp_path / "other", tmp_path / "in", labels=table)
    with pytest.raises(InputError, match="not a readable CSV"):
        make("folder", tmp_path / "other", tmp_path / "in", labels=tmp_path / "none.csv")


def test_a_gzip_that_is_no_tar(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    with pytest.raises(InputError, match="no tar archive"):
        make("folder", tmp_path / "set", tmp_path / "x.tar.gz")


def test_real_archive(real_data, tmp_path):
    shards = make("folder", tmp_path / "set", real_data / "cifar10-sample.tar.gz", workers=2)
    assert (
        shards.summary()["samples"] == {"test": 2000, "train": 20000} and shards.num_classes == 10
    )
    assert set(np.bincount(shards.split("train").label)) == {2000}
