"""Existing webdatasets, as its own writer makes them, and sets of our own."""

import io
import json
import re
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.prepare import write_shard
from data_prep.readers import cached_reader
from data_prep.shard_plan import make_shard_plan
from data_prep.tars import remove_decompressed
from r2id.config import PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError
from tests.data_prep.conftest import files_of, make, write_images
from tests.data_prep.test_celeba import ATTRIBUTES, write_original


def picture(number, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((6, 5, 3), number, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)


def samples_of(start, count):
    return [
        {
            "__key__": f"some/dir/sample{number}",
            "jpg": picture(number, "JPEG"),
            "cls": number % 3,
            "txt": f"a ⟨{number}⟩",
            "json": {"url": f"http://x/{number}", "tags": [number]},
            "depth.npy": np.zeros(3),
        }
        for number in range(start, start + count)
    ]


def read(shards):
    found = {}
    for name in shards.manifest.splits:
        for sample in webdataset.WebDataset(
            [str(path) for path in shards.split(name).files], shardshuffle=False
        ):
            found[sample["jpg"] if "jpg" in sample else sample["png"]] = (
                name,
                sample.get("cls"),
                json.loads(sample["json"]),
            )
    return found


@pytest.mark.parametrize(
    "layout",
    [
        ("photos-train-{:03d}.tar", "photos-val-{:03d}.tar"),
        ("train/{}.tar", "validation/{}.tar"),
        ("training_{}.tar.gz", "valid_{}.tgz"),
        ("train/{}.tar.gz", "val/{}.tar.gz"),
    ],
)
def test_everything_is_kept(tmp_path, layout):
    for part, (pattern, start) in enumerate(zip(layout, (0, 100), strict=True)):
        for number in range(2):
            write_tar(
                tmp_path / "source" / pattern.format(number),
                samples_of(start + 10 * number, 6 + part),
            )
    shards = make("webdataset", tmp_path / "set", tmp_path / "source")
    assert verify(shards.folder) == [] and shards.class_names == ["0", "1", "2"]
    assert shards.summary()["samples"] == {"train": 12, "val": 14}
    found = read(shards)
    for number in (0, 5, 10, 15, 100, 106, 116):
        split, label, meta = found[picture(number, "JPEG")]
        assert split == ("train" if number < 100 else "val") and int(label) == number % 3
        assert (
            meta["caption"] == f"a ⟨{number}⟩"
            and meta["url"] == f"http://x/{number}"
            and meta["tags"] == [number]
        )
        assert meta["source"] == f"some/dir/sample{number}.jpg" and meta["height"] == 6


def test_one_tar_without_splits_or_classes(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [{"__key__": f"{number}.v2", "png": picture(number)} for number in range(3)]
        + [{"__key__": f"k{number}", "png": picture(number)} for number in range(20)],
    )
    shards = make("webdataset", tmp_path / "set", tmp_path / "x.tar")
    assert (
        shards.num_classes == 0
        and sum(shards.summary()["samples"].values()) + shards.manifest.rejects == 23
    )


def test_a_set_of_our_own(tmp_path):
    write_images(
        tmp_path / "in",
        [f"{label}/{number}.png" for label in ("bee", "ant") for number in range(20)],
    )
    first = make("folder", tmp_path / "one", tmp_path / "in")
    second = make("webdataset", tmp_path / "two", tmp_path / "one")
    assert second.class_names == first.class_names == ["ant", "bee"]
    assert {image: (split, label) for image, (split, label, _) in read(first).items()} == {
        image: (split, label) for image, (split, label, _) in read(second).items()
    }


def test_samples_that_are_none(tmp_path):
    write_tar(
        tmp_path / "in/train.tar",
        [
            {"__key__": "good", "png": picture(1)},
            {"__key__": "empty", "txt": "no image"},
            {"__key__": "two", "png": picture(2), "jpg": picture(2, "JPEG")},
            {"__key__": "text", "jpg": b"no picture"},
            {"__key__": "json", "jpg": picture(3, "JPEG"), "json": b"{"},
            {"__key__": "deep", "jpg": picture(4, "JPEG"), "json": b"[" * 100_000},
            {"__key__": "latin", "jpg": picture(5, "JPEG"), "txt": b"caf\xe9"},
        ],
    )
    shards = make("webdataset", tmp_path / "set", tmp_path / "in")
    assert len(shards.split("train")) == 1 and shards.manifest.rejects == 6
    table = (tmp_path / "set/rejects.csv").read_text()
    assert (
        "empty,a sample with no image" in table and '"a sample with 2 images (jpg, png)"' in table
    )
    assert "text.jpg,not an image" in table
    assert "json.jpg,its JSON: Expecting property name" in table
    assert "latin.jpg,its text: 'utf-8' codec can't decode byte 0xe9" in table
    assert "deep.jpg,its JSON is nested too deeply" in table


@pytest.mark.parametrize("samples", [5, 1])
def test_samples_of_several_images_each_are_named(tmp_path, samples):
    write_tar(
        tmp_path / "x.tar",
        [
            {"__key__": f"scene{number}", "left.jpg": picture(1), "right.jpg": picture(2)}
            for number in range(samples)
        ],
    )
    words = r"no usable samples: scene0: a sample with 2 images \(left\.jpg, right\.jpg\)"
    with pytest.raises(InputError, match=words):
        make("webdataset", tmp_path / "set", tmp_path / "x.tar")


@pytest.mark.parametrize("number", [999_999_999, 100_000])
def test_a_class_number_that_is_none_is_refused(tmp_path, number):
    samples = samples_of(0, 6)
    samples[4]["cls"] = number
    write_tar(tmp_path / "x.tar", samples)
    words = rf"x\.tar: some/dir/sample4\.cls: class number {number}, .* less than 100000"
    with pytest.raises(InputError, match=words):
        make("webdataset", tmp_path / "set", tmp_path / "x.tar")


def test_classes_that_are_names(tmp_path):
    names = ["dog", "Katze", "n01440764", "été"]
    source = [{"__key__": f"k{n}", "png": picture(n), "cls": names[n % 4]} for n in range(40)]
    source[0]["cls"] = " dog\n"
    raw = [{**sample, "cls": sample["cls"].encode()} for sample in source]
    write_tar(tmp_path / "train/x.tar", raw[:24])
    write_tar(tmp_path / "test/x.tar", raw[24:])
    shards = make("webdataset", tmp_path / "set", tmp_path, max_rejects=0)
    assert shards.class_names == sorted(names)
    found = read(shards)
    for number in range(40):
        split, label, _ = found[picture(number)]
        assert split == ("train" if number < 24 else "test")
        assert shards.class_names[int(label)] == names[number % 4]


def test_other_names_of_classes_are_another_source(tmp_path):
    """Of the same lengths and in the same order, so that nothing else tells them apart."""

    def write(first):
        names = (first, "dog")
        source = [
            {"__key__": f"k{n}", "png": picture(n), "cls": names[n % 2].encode()} for n in range(8)
        ]
        write_tar(tmp_path / "x.tar", source)

    write("cat")
    make("webdataset", tmp_path / "set", tmp_path / "x.tar")
    write("cow")
    with pytest.raises(InputError, match="was made from another source"):
        make("webdataset", tmp_path / "set", tmp_path / "x.tar")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ([b"dog", b"3"], r"k1\.cls: b'3', but .*k0\.cls: b'dog': .* all numbers or all names"),
        ([b"3", b"dog"], r"k1\.cls: b'dog', but .*k0\.cls: b'3': .* all numbers or all names"),
        *(
            ([content], r"k0\.cls: .*: must be a class number, 0 or more, or a name")
            for content in (b"-1", b"0.5", b"", b"\xff\xfe", b"a" * 257, b"a\nb")
        ),
    ],
)
def test_classes_that_are_none_or_mixed(tmp_path, classes, words):
    write_tar(
        tmp_path / "x.tar",
        [{"__key__": f"k{n}", "png": picture(n), "cls": cls} for n, cls in enumerate(classes)],
    )
    with pytest.raises(InputError, match=words):
        make("webdataset", tmp_path / "set", tmp_path / "x.tar")


def test_classes_with_gaps_are_numbered_as_they_occur(tmp_path, capfd):
    samples = [
        {**sample, "cls": (3, 7, 99_999)[n % 3]} for n, sample in enumerate(samples_of(0, 9))
    ]
    write_tar(tmp_path / "train.tar", samples)
    shards = make("webdataset", tmp_path / "set", tmp_path / "train.tar")
    assert shards.class_names == ["3", "7", "99999"]
    assert sorted(shards.split("train").label.tolist()) == [0] * 3 + [1] * 3 + [2] * 3
    said = capfd.readouterr().err
    assert "3 classes with numbers from 3 to 99999, numbered anew" in said
    found = {image: int(label) for image, (_, label, _) in read(shards).items()}
    assert found[picture(1, "JPEG")] == 1 and found[picture(8, "JPEG")] == 2


def test_a_set_of_our_own_keeps_its_attributes(tmp_path):
    write_original(tmp_path / "celeba")
    first = make("celeba", tmp_path / "one", tmp_path / "celeba", label="Male")
    second = make("webdataset", tmp_path / "two", tmp_path / "one")
    assert second.manifest.attribute_names == first.manifest.attribute_names == ATTRIBUTES
    assert second.class_names == first.class_names and read(second) == read(first)
    (tmp_path / "one/manifest.json").unlink()
    with pytest.raises(InputError, match="unfinished"):
        make("webdataset", tmp_path / "three", tmp_path / "one")


def test_masks_beside_the_image_and_a_source_of_its_own(tmp_path):
    write_tar(
        tmp_path / "x.tar",
        [
            {
                "__key__": f"k{number}",
                "png": picture(number),
                "seg.png": picture(9),
                "cls": 1,
                "json": {"source": "flickr"},
            }
            for number in range(3)
        ],
    )
    shards = make("webdataset", tmp_path / "set", tmp_path / "x.tar")
    assert shards.manifest.rejects == 0
    assert {image: meta["source"] for image, (_, _, meta) in read(shards).items()} == {
        picture(number): "flickr" for number in range(3)
    }


def test_dots_in_names(tmp_path):
    """Files that are named after numbers keep their classes, and masks and depths do not count."""
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        for number in range(20):
            members = {"png": picture(number), "cls": str(number % 2).encode(), "TXT": b"words"}
            for kind, content in members.items():
                entry = tarfile.TarInfo(f"22.0/Track {number}.{number} (A).{kind}")
                entry.size = len(content)
                file.addfile(entry, io.BytesIO(content))
        for name in ("plain.png", "plain.seg.png", "plain.more.cls", "plain.cls"):
            content = picture(99) if name.endswith("png") else b"1"
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            file.addfile(entry, io.BytesIO(content))
    shards = make("webdataset", tmp_path / "out", tar)
    found = read(shards)
    assert len(found) == 21 and not (tmp_path / "out" / "rejects.csv").exists()
    for number in range(20):
        _, label, meta = found[picture(number)]
        assert int(label) == number % 2 and meta["caption"] == "words"
        assert meta["source"] == f"22.0/Track {number}.{number} (A).png"
    assert int(found[picture(99)][1]) == 1


def test_a_shard_that_is_a_link_to_nothing(tmp_path):
    write_tar(tmp_path / "in/a-0.tar", samples_of(0, 3))
    (tmp_path / "in/a-1.tar").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"a-1\.tar"):
        make("webdataset", tmp_path / "set", tmp_path / "in")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_set_inside_its_source(tmp_path, suffix):
    """Neither its shards nor decompressed copies are taken for tars of the source."""
    for number in range(2):
        write_tar(tmp_path / f"in/train-{number}.{suffix}", samples_of(10 * number, 6))
    whole = files_of(make("webdataset", tmp_path / "set", tmp_path / "in").folder)
    out = tmp_path / "in/a/set"
    plan = make_shard_plan(PrepareConfig(dataset="webdataset", source=tmp_path / "in", out=out))
    cached_reader.cache_clear()  # as in a process of its own
    write_shard(plan, 0)
    make("webdataset", out, tmp_path / "in")
    assert files_of(make("webdataset", out, tmp_path / "in").folder) == whole


def test_a_source_inside_the_set_is_refused_and_kept(tmp_path):
    write_tar(tmp_path / "set/source/train.tar", samples_of(0, 6))
    for source in ("set", "set/source", "set/source/train.tar"):
        with pytest.raises(InputError, match=f"/set: holds the source .*{source}: choose another"):
            make("webdataset", tmp_path / "set", tmp_path / source)
    remove_decompressed(tmp_path / "set/source")
    assert (tmp_path / "set/source/train.tar").exists()


def test_more_tars_than_files_may_be_open(tmp_path, monkeypatch):
    """Their classes are read while they are listed, their images while shards are written."""
    monkeypatch.setattr("data_prep.webdataset._OPEN_FILES", 5)
    for number in range(60):
        sample = {"__key__": f"k{number}", "png": picture(number), "cls": number % 2}
        write_tar(tmp_path / f"in/{number}.tar", [sample])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, before[1]))
    try:
        shards = make("webdataset", tmp_path / "set", tmp_path / "in")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert shards.summary()["samples"] == {"test": 6, "train": 54}
    assert verify(shards.folder) == []


def test_other_labels_are_another_source(tmp_path):
    write_tar(tmp_path / "x.tar", samples_of(0, 6))
    make("webdataset", tmp_path / "set", tmp_path / "x.tar")
    write_tar(
        tmp_path / "x.tar", [{**sample, "cls": 2 - sample["cls"]} for sample in samples_of(0, 6)]
    )
    with pytest.raises(InputError, match=f"{tmp_path / 'set'}: .*another source"):
        make("webdataset", tmp_path / "set", tmp_path / "x.tar")


def test_what_is_no_webdataset(tmp_path):
    (tmp_path / "in").mkdir()
    for source, words in (
        (None, "source: missing"),
        (tmp_path / "nowhere", "nowhere"),
        (tmp_path / "in", r"/in: .*\.tar"),
    ):
        with pytest.raises(InputError, match=words):
            make("webdataset", tmp_path / "set", source)
    write_tar(tmp_path / "in/a.tar", [{"__key__": "a", "txt": "b"}])
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "in"))):
        make("webdataset", tmp_path / "set", tmp_path / "in")
    write_tar(tmp_path / "in/a.tar", [{"__key__": "a", "png": picture(1), "cls": b"-1"}])
    with pytest.raises(InputError, match=r"a\.cls: b'-1'"):
        make("webdataset", tmp_path / "set", tmp_path / "in")
    with tarfile.open(tmp_path / "in/a.tar") as archive:
        offset = archive.getmembers()[1].offset
    (tmp_path / "in/a.tar").write_bytes((tmp_path / "in/a.tar").read_bytes()[:offset])
    with pytest.raises(InputError, match=r"a\.tar"):
        make("webdataset", tmp_path / "set", tmp_path / "in")
