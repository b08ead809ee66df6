"""Folders of images as people have them, with odd names, links and permissions."""

import io
import json
import os
import resource
import tarfile
import time
from pathlib import Path

import pytest
from PIL import Image, features

from data_prep.sources import Folder, Zip, is_image
from data_prep.tars import open_source
from r2id.config import PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.archives import rejected, write_tar, write_zip
from tests.data_prep.conftest import make, prepare_as_nobody, write_images
from tests.forked import FORKED


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
    with pytest.raises(InputError, match=r"caf\\xe9"):
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
    assert str(tmp_path / "in/b/1.png") in run("none")
    (tmp_path / "in/b").chmod(0o755)
    (tmp_path / "in/a/1.png").chmod(0)
    assert run("one") == "" and list(rejected(out / "one")) == ["a/1.png"]
    (tmp_path / "in/b").chmod(0)
    assert str(tmp_path / "in/b") in run("two")
    assert not (out / "two").exists()


@pytest.mark.parametrize("name", ["in", "in.zip"])
def test_a_fault_of_the_system_rejects_no_image(tmp_path, name):
    write_images(tmp_path / "in", ["1.png"])
    image = (tmp_path / "in/1.png").read_bytes()
    write_zip(tmp_path / "in.zip", {"1.png": image})
    (entry,) = open_source(tmp_path / name, tmp_path).files(is_image)
    source, newest = open_source(tmp_path / name, tmp_path), time.time_ns()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(WorkError, match=r"/in.*: cannot be read: Too many open files$"):
            source.read(entry.place, entry.size, newest)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert source.read(entry.place, entry.size, newest) == image


def test_a_disk_that_gives_errors_rejects_no_image(tmp_path):
    """Here it is the memory of this process, whose beginning nobody may read."""
    (tmp_path / "1.png").symlink_to("/proc/self/mem")
    with pytest.raises(WorkError, match=r"1\.png: cannot be read: Input/output error$"):
        Folder(tmp_path).read(b"1.png", 0, 1 << 62)
    write_zip(tmp_path / "x.zip", {"1.png": bytes(9), "2.png": os.urandom(100_000)})
    source = Zip(tmp_path / "x.zip")
    first, _ = source.files(is_image)
    with Path("/proc/self/mem").open("rb") as memory:
        os.dup2(memory.fileno(), source._archive.fp.fileno())
    with pytest.raises(WorkError, match=r"x\.zip: cannot be read: Input/output error$"):
        source.read(first.place, first.size, 1 << 62)


def test_a_hard_link_in_a_tar_is_to_the_last_file_of_its_name(tmp_path):
    """That is what tar unpacks, since by then it has replaced the one before."""
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for content in (b"before", b"after"):
            info = tarfile.TarInfo("a.png")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.png"
        archive.addfile(link)
    tar = open_source(tmp_path / "x.tar", tmp_path)
    files = tar.files(is_image)
    (place,) = [(entry.place, entry.size) for entry in files if entry.name == "b.png"]
    assert tar.read(*place, files.newest) == b"after"


def test_what_lies_beside_the_images(tmp_path, capfd):
    write_images(tmp_path / "in", ["1.png", "2.png"])
    (tmp_path / "in/readme.txt").write_text("no image")
    (tmp_path / "in/._1.png").write_text("left by an archiver")
    (tmp_path / "in/gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "in/self.png").symlink_to("self.png")
    (tmp_path / "in/self").symlink_to("self")
    os.mkfifo(tmp_path / "in/pipe.png")
    make("folder", tmp_path / "set", tmp_path / "in")
    assert rejected(tmp_path / "set") == {
        "gone.png": "a link to nothing",
        "pipe.png": "no regular file",
        "self.png": "a link to nothing",
    }
    said = capfd.readouterr().err
    assert "left out: 1 hidden and 1 .txt and 1 without a suffix, " in said
    assert "train 2" in said and "3 rejected" in said


@pytest.mark.parametrize("name", ["in", "in.zip", "in.tar"])
def test_classes_whose_images_have_unknown_suffixes(tmp_path, capfd, name):
    write_images(tmp_path / "in", [f"a/{number}.png" for number in range(3)])
    content = {f"top/{path}": (tmp_path / "in" / path).read_bytes() for path in ("a/0.png",)}
    for other in ("b/1.HEIC", "b/2.heic", "a/notes.txt", "readme.txt", ".git/x"):
        (tmp_path / "in" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / other).write_text("other")
        content |= {f"top/{other}": b"other"}
    (tmp_path / "in/c").mkdir()
    write_zip(tmp_path / "in.zip", content)
    write_tar(tmp_path / "in.tar", content)
    shards = make("folder", tmp_path / "set", tmp_path / name)
    said = capfd.readouterr().err
    assert shards.class_names == ["a"]
    assert "left out: " in said and "2 .heic" in said and "2 .txt" in said
    empty = "'b', 'c'" if name == "in" else "'top/b'"
    assert f"{name}: no image of a known suffix in {empty}\n" in said


def test_all_suffixes_of_formats_that_are_read(tmp_path):
    kinds = {"jfif": "JPEG", "jpe": "JPEG", "pbm": "PPM"}
    kinds |= {"avif": "AVIF"} if features.check("avif") else {}
    kinds |= {"jp2": "JPEG2000"} if features.check("jpg_2000") else {}
    for number, (suffix, kind) in enumerate(kinds.items()):
        (tmp_path / f"in/{suffix}").mkdir(parents=True)
        for image in range(2):
            mode, size = "1" if suffix == "pbm" else "RGB", (20 + number, 20 + image)
            Image.new(mode, size).save(tmp_path / f"in/{suffix}/{image}.{suffix}", kind)
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert shards.class_names == sorted(kinds) and shards.manifest.rejects == 0
    assert verify(shards.folder) == []


def test_a_png_that_would_fill_the_memory(tmp_path):
    write_images(tmp_path / "in", ["1.png"])
    huge = io.BytesIO()
    Image.new("1", (30000, 30000)).save(huge, "PNG")
    (tmp_path / "in/huge.png").write_bytes(huge.getvalue())
    assert len(huge.getvalue()) < 1_000_000
    make("folder", tmp_path / "set", tmp_path / "in")
    assert "30000x30000" in rejected(tmp_path / "set")["huge.png"]
