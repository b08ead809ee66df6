"""Tars and zips as people have them: read in place, distrusted, and refused when damaged."""

import gzip
import io
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest

from data_prep.prepare import make_shard_plan, write_shard
from data_prep.sources import is_image
from data_prep.tars import Tar
from r2id.config import PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.archives import ARCHIVES, IMAGES, picture, rejected, write_tar, write_zip
from tests.data_prep.conftest import make
from tests.data_prep.test_folder import facts_of


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


def test_a_zip_with_backslashes_is_like_one_with_slashes(tmp_path):
    members = {name.replace("/", "\\"): data for name, data in IMAGES.items()}
    write_zip(tmp_path / "pets.zip", {"pets\\": b"", **members})
    shards = make("folder", tmp_path / "set", tmp_path / "pets.zip")
    assert verify(shards.folder) == [] and shards.class_names == ["cat", "dog"]
    assert shards.summary()["samples"] == {"test": 18, "train": 18}
    write_zip(tmp_path / "own.zip", {"a/x\\1.png": picture(1), "a/..\\2.png": picture(2)})
    assert make("folder", tmp_path / "own", tmp_path / "own.zip").class_names == ["a"]
    write_zip(tmp_path / "out.zip", {"1.png": picture(1), "..\\2.png": picture(2)})
    make("folder", tmp_path / "out", tmp_path / "out.zip")
    assert rejected(tmp_path / "out") == {"../2.png": "its name leads out of the archive"}


def test_a_tar_whose_first_name_begins_like_a_zip(tmp_path):
    with tarfile.open(tmp_path / "lots.tar", "w") as archive:
        info = tarfile.TarInfo("PKLot/1.png")
        info.size = len(picture(1))
        archive.addfile(info, io.BytesIO(picture(1)))
    assert (tmp_path / "lots.tar").read_bytes().startswith(b"PK")
    assert len(make("folder", tmp_path / "set", tmp_path / "lots.tar").split("train")) == 1


def test_a_folder_beside_the_splits_of_an_archive_is_refused(tmp_path):
    write_tar(tmp_path / "pets.tar", IMAGES | {"pets/extra/1.png": picture(1)})
    with pytest.raises(InputError, match=r"pets\.tar: folder 'extra' lies beside 'test', but is"):
        make("folder", tmp_path / "set", tmp_path / "pets.tar")


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
    assert sum(shards.summary()["samples"].values()) == 3 and verify(shards.folder) == []
    assert rejected(tmp_path / "set") == {
        "../../out.png": "its name leads out of the archive",
        "/abs.png": "its name leads out of the archive",
        "a/../../up.png": "its name leads out of the archive",
        "a/1.png": "twice in the archive",
        b"a/nul\0x.png".decode(): "its name holds a NUL",
        "a/soft.png": "a link",
        "a/fifo.png": "no regular file",
    }


def write_links(path, mode="w"):
    """A tar with hard links: to a file, to a link, to one without a suffix, and to nothing."""
    with tarfile.open(path, mode) as archive:
        for name, number in (("a/1.png", 1), ("./data/blob", 2), ("b/2.png", 3)):
            info = tarfile.TarInfo(name)
            info.size = len(picture(number))
            archive.addfile(info, io.BytesIO(picture(number)))
        for name, target in (
            ("b/1.png", "a/1.png"),
            ("c/1.png", "b/1.png"),
            ("c/" + "long " * 40 + "name.png", "./data/blob"),
            ("a/none.png", "a/nowhere.png"),
            ("a/later.png", "a/last.png"),
            ("a/out.png", "/etc/passwd"),
        ):
            archive.addfile(link(name, target, tarfile.LNKTYPE))
        info = tarfile.TarInfo("a/last.png")
        info.size = len(picture(4))
        archive.addfile(info, io.BytesIO(picture(4)))


@pytest.mark.parametrize(("name", "mode"), [("x.tar", "w"), ("x.tar.gz", "w:gz")])
def test_hard_links_are_the_files_that_they_are_links_to(tmp_path, name, mode):
    write_links(tmp_path / name, mode)
    shards = make("folder", tmp_path / "set", tmp_path / name)
    assert verify(shards.folder) == [] and shards.class_names == ["a", "b", "c"]
    found = {}
    for split in map(shards.split, shards.manifest.splits):
        for index, (key, facts) in enumerate(facts_of(split).items()):
            assert split.key(index) == key
            found[facts["source"]] = split.read(index)
    assert found == {
        "a/1.png": picture(1),
        "a/last.png": picture(4),
        "b/1.png": picture(1),
        "b/2.png": picture(3),
        "c/1.png": picture(1),
        "c/" + "long " * 40 + "name.png": picture(2),
    }
    reasons = rejected(tmp_path / "set")
    assert reasons == dict.fromkeys(
        ("a/none.png", "a/later.png", "a/out.png"), "a link to nothing in the archive"
    )


def test_a_hard_link_in_a_tar_of_tars(tmp_path):
    write_links(tmp_path / "inner.tar")
    write_tar(tmp_path / "outer.tar", {"n1.tar": (tmp_path / "inner.tar").read_bytes()})
    tar = Tar(tmp_path / "outer.tar", nested=True)
    files = tar.files(is_image)
    contents = {entry.name: tar.read(entry.place, entry.size, files.newest) for entry in files}
    assert contents["n1/c/1.png"] == picture(1) and len(contents) == 6
    assert len(files.rejects) == 3


def test_a_hard_link_of_a_webdataset(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("a.png", "a.cls"):
            content = picture(1) if name.endswith("png") else b"0"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        archive.addfile(link("b.png", "a.png", tarfile.LNKTYPE))
        archive.addfile(link("b.cls", "a.cls", tarfile.LNKTYPE))
    split = make("webdataset", tmp_path / "set", tmp_path / "x.tar").split("train")
    assert [split.read(index) for index in range(2)] == [picture(1)] * 2
    assert split.label.tolist() == [0, 0]


HIDDEN = [
    "a/.ipynb_checkpoints/1-checkpoint.png",
    ".Trash/1.png",
    "__MACOSX/a/1.png",
    "__MACOSX/a/._1.png",
    "a/@eaDir/1.png",
    "b/._1.png",
]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_hidden_folders_are_left_out_of_every_source(tmp_path, kind):
    members = {f"{label}/{number}.png": picture(number) for label in "ab" for number in range(4)}
    hidden = {name: picture(99) for name in HIDDEN} | {"a/.hidden/1.npy": b"x"}
    source = tmp_path / {"folder": "in", "tar": "x.tar", "zip": "x.zip"}[kind]
    if kind == "folder":
        for name, data in (members | hidden).items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    else:
        {"tar": write_tar, "zip": write_zip}[kind](source, members | hidden)
    shards = make("folder", tmp_path / "set", source)
    assert shards.class_names == ["a", "b"] and shards.manifest.rejects == 0
    assert sum(shards.summary()["samples"].values()) == 8


def test_hidden_folders_are_left_out_of_a_webdataset(tmp_path):
    write_tar(tmp_path / "x.tar", {"a/1.png": picture(1)} | {name: picture(9) for name in HIDDEN})
    shards = make("webdataset", tmp_path / "set", tmp_path / "x.tar")
    assert shards.summary()["samples"] == {"train": 1}


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
    with pytest.raises(InputError, match=re.escape(name)) as caught:
        make("folder", tmp_path / "set", tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.tmp")) and not (tmp_path / "set/plan.json").exists()


def test_a_bit_in_a_zip_members_content_is_a_row(tmp_path):
    write_zip(tmp_path / "pets.zip", IMAGES)
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        info = archive.infolist()[4]
    flip(tmp_path / "pets.zip", info.header_offset + 30 + len(info.filename) + 20)
    make("folder", tmp_path / "set", tmp_path / "pets.zip")
    assert list(rejected(tmp_path / "set")) == [info.filename]


@pytest.mark.parametrize(
    "packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_member_of_a_zip_is_a_row(tmp_path, packing):
    """Whatever decompressor it takes."""
    with zipfile.ZipFile(tmp_path / "pets.zip", "w", packing) as archive:
        for name, data in IMAGES.items():
            archive.writestr(name, data)
        info = archive.infolist()[4]
    start = info.header_offset + 30 + len(info.filename)
    for place in range(10, min(info.compress_size, 40), 8):
        flip(tmp_path / "pets.zip", start + place)
        out = tmp_path / f"set{place}"
        make("folder", out, tmp_path / "pets.zip")
        assert list(rejected(out)) == [info.filename]
        flip(tmp_path / "pets.zip", start + place)


@pytest.mark.parametrize("name", ["pets.tar", "pets.zip"])
def test_an_archive_that_changes_after_the_plan(tmp_path, name):
    next(write for known, write in ARCHIVES.values() if known == name)(tmp_path / name)
    plan = make_shard_plan(
        PrepareConfig(dataset="folder", source=tmp_path / name, out=tmp_path / "set")
    )
    os.utime(tmp_path / name)
    with pytest.raises(WorkError, match=re.escape(name)):
        write_shard(plan, 0)
    (tmp_path / name).unlink()
    with pytest.raises((WorkError, InputError), match=re.escape(name)):
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
    with pytest.raises(WorkError, match=r"pets\.tar: .*pets/"):
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
    with pytest.raises(InputError, match=r"pets\.tar\.xz"):
        make_shard_plan(config)


def test_an_archive_that_expands_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.tars._EXPANSION_FREE", 1 << 20)
    write_tar(tmp_path / "bomb.tar.gz", {"a/1.png": bytes(50_000_000)}, "w:gz")
    with pytest.raises(InputError, match=r"bomb\.tar\.gz: .* 200 "):
        make("folder", tmp_path / "set", tmp_path / "bomb.tar.gz")
    assert not list((tmp_path / "set").rglob("*.*"))


def test_a_gzip_that_is_no_tar(tmp_path):
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"no tar" * 1000))
    with pytest.raises(InputError, match=r"[0-9a-f]+\.tar|x\.tar\.gz"):
        make("folder", tmp_path / "set", tmp_path / "x.tar.gz")


@pytest.mark.slow
def test_real_archive(real_data, tmp_path):
    shards = make("folder", tmp_path / "set", real_data / "cifar10-sample.tar.gz", workers=2)
    assert (
        shards.summary()["samples"] == {"test": 2000, "train": 20000} and shards.num_classes == 10
    )
    assert set(np.bincount(shards.split("train").label)) == {2000}
