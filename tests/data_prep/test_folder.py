"""Folders of images: splits and classes from their names, rejects and their budget."""

import csv
import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from r2id.data.records import decode
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import make, write_images


def facts_of(split):
    """key → what the JSON member says."""
    samples = webdataset.WebDataset([str(path) for path in split.files], shardshuffle=False)
    return {sample["__key__"]: json.loads(sample["json"]) for sample in samples}


def test_classes_come_from_folders(tmp_path):
    names = [
        f"{label}/{'deeper/' if number % 2 else ''}{number}.png"
        for label in ("dog", "cat")
        for number in range(20)
    ]
    write_images(tmp_path / "in", names)
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert shards.class_names == ["cat", "dog"] and verify(shards.folder) == []
    assert shards.summary()["samples"] == {"train": 36, "test": 4}
    test = shards.split("test")
    assert np.bincount(test.label).tolist() == [2, 2]
    for split in (test, shards.split("train")):
        facts = facts_of(split)
        for index in range(len(split)):
            source = facts[split.key(index)]["source"]
            assert shards.class_names[split.label[index]] == source.split("/")[0]
            assert split.read(index) == (tmp_path / "in" / source).read_bytes()


def test_splits_come_from_folders(tmp_path):
    names = [
        f"{split}/{label}/{number}.jpg"
        for split in ("train", "validation", "Test")
        for label in "ab"
        for number in (1, 2)
    ]
    write_images(tmp_path / "in", names)
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert shards.summary()["samples"] == {
        "train": 4,
        "val": 4,
        "test": 4,
    } and shards.class_names == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "in", ["train/1.png", "bus/1.png"])
    write_images(tmp_path / "in", ["bus/red/2.png"])
    assert make("folder", tmp_path / "set", tmp_path / "in").class_names == ["bus", "train"]


def test_a_flat_folder_has_no_classes(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(30)])
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert shards.num_classes == 0 and shards.summary()["samples"] == {"train": 27, "test": 3}
    assert set(shards.split("train").label) == {-1}


def test_odd_names_sizes_and_formats(tmp_path):
    folder = tmp_path / "in"
    names = ["img.v2.png", "img.v3.png", "über ß.jpg", "new\nline.webp", "a" * 200 + ".png"]
    write_images(folder, names)
    write_images(folder, ["one.png"], size=(1, 1))
    write_images(folder, ["long.png"], size=(1, 300))
    write_images(folder, ["x.bmp", "y.gif", "z.tiff", "upper.JPEG"])
    Image.new("RGBA", (4, 3)).save(folder / "really a png.jpg", "PNG")
    (folder / ".hidden.png").write_text("no image")
    (folder / "readme.txt").write_text("no image")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    shards = make("folder", tmp_path / "set", folder)
    assert shards.manifest.rejects == 0 and sum(shards.summary()["samples"].values()) == 12
    assert verify(shards.folder) == []
    exts = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        samples = webdataset.WebDataset([str(path) for path in split.files], shardshuffle=False)
        exts |= {
            json.loads(s["json"])["source"]: ext
            for s in samples
            for ext in ("jpg", "png", "webp")
            if ext in s
        }
    assert exts == {
        "img.v2.png": "png",
        "img.v3.png": "png",
        "über ß.jpg": "jpg",
        "new\nline.webp": "webp",
        "a" * 200 + ".png": "png",
        "one.png": "png",
        "long.png": "png",
        "x.bmp": "png",
        "y.gif": "png",
        "z.tiff": "png",
        "upper.JPEG": "jpg",
        "really a png.jpg": "png",
    }


def test_size_after_orientation_is_recorded_and_bytes_are_kept(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.new("RGB", (40, 20)).save(tmp_path / "in/turned.jpg", exif=exif)
    split = make("folder", tmp_path / "set", tmp_path / "in").split("train")
    assert (split.height[0], split.width[0]) == (40, 20) == decode(split.read(0)).shape[:2]
    assert split.read(0) == (tmp_path / "in/turned.jpg").read_bytes()


def test_what_is_no_image_gets_a_row_with_the_reason(tmp_path):
    folder = tmp_path / "in"
    write_images(folder, [f"a/{number}.png" for number in range(8)])
    (folder / "a/text.jpg").write_text("this is no picture")
    (folder / "a/empty.png").write_bytes(b"")
    (folder / "a/cut.png").write_bytes((folder / "a/1.png").read_bytes()[:-30])
    shards = make("folder", tmp_path / "set", folder)
    assert sum(shards.summary()["samples"].values()) == 8 and shards.summary()["rejects"] == 3
    with (tmp_path / "set/rejects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["source"] for row in rows} == {"a/text.jpg", "a/empty.png", "a/cut.png"}
    assert all(row["reason"] and row["split"] in ("train", "test") for row in rows)
    assert verify(shards.folder) == []


def test_too_many_rejects_stop_the_work(tmp_path):
    write_images(tmp_path / "in", [f"{number}.png" for number in range(20)])
    for number in range(11):
        (tmp_path / f"in/text{number}.jpg").write_text("no picture")
    with pytest.raises(WorkError, match=r"11 of 31 .*text\d+\.jpg"):
        make("folder", tmp_path / "set", tmp_path / "in")
    assert not (tmp_path / "set/manifest.json").exists()


def test_nothing_but_rejects_is_a_wrong_source(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/text.jpg").write_text("no picture")
    with pytest.raises(InputError, match=r"text\.jpg"):
        make("folder", tmp_path / "set", tmp_path / "in")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], r"/in: .*\.png"),
        (["notes.txt"], r"/in: .*\.png"),
        (["a/1.png", "2.png"], r"'2\.png', 'a/1\.png'"),
        (["train/a/1.png", "train/2.png"], r"'train/2\.png', 'train/a/1\.png'"),
        (
            ["train/a/1.png", "Test/a/2.png", "extra/a/3.png"],
            "/in: folder 'extra' lies beside 'Test', but is neither train, val nor test",
        ),
        (["train/a/1.png", "test/a/2.png", "extra/3.png"], "'extra' lies beside 'test'"),
    ],
)
def test_sources_that_make_no_dataset(tmp_path, names, words):
    (tmp_path / "in").mkdir()
    for name in names:
        if name.endswith("png"):
            write_images(tmp_path / "in", [name])
        else:
            (tmp_path / "in" / name).write_text("text")
    with pytest.raises(InputError, match=words):
        make("folder", tmp_path / "set", tmp_path / "in")
    assert not (tmp_path / "set").exists()


def test_sources_that_are_missing(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        make("folder", tmp_path / "set", tmp_path / "nowhere")
    with pytest.raises(InputError, match="source: missing"):
        make("folder", tmp_path / "set")


def test_real_photos(real_data, tmp_path):
    """300 photos in, each audited that is trained on: every byte kept, every size right."""
    source = real_data / "imagenet-sample"
    shards = make("folder", tmp_path / "set", source, shard_mb=8.0)
    assert shards.summary()["samples"] == {"train": 270, "test": 30}
    assert shards.num_classes == 300 and verify(shards.folder) == []
    split = shards.split("train")
    assert all(path.stat().st_size <= 8e6 for path in split.files) and len(split.files) > 1
    for key, facts in facts_of(split).items():
        index = split.keys.index(key).as_py()
        assert split.read(index) == (source / facts["source"]).read_bytes()
        with Image.open(source / facts["source"]) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            assert (image.height, image.width)[:: -1 if turned else 1] == (
                split.height[index],
                split.width[index],
            )
