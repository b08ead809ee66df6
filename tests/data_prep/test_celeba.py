"""CelebA in its published text files and in Kaggle's tables, small but in the exact layouts."""

import json
import re
import shutil
import zipfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep.prepare import make_shard_plan, write_shard
from r2id.config import DataConfig, PrepareConfig
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.archives import rejected
from tests.data_prep.conftest import make

ATTRIBUTES = ["5_o_Clock_Shadow", "Eyeglasses", "Male", "Young"]
POINTS = [
    f"{part}_{axis}"
    for part in ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
    for axis in "xy"
]
COUNT = 40


def values(number):
    """Attributes ±1, identity, landmarks, box, partition of an image."""
    attributes = [1 if (number >> bit) & 1 else -1 for bit in range(4)]
    return (
        attributes,
        1 + number % 7,
        [number + i for i in range(10)],
        [number, 2, 30, 40],
        (0, 0, 0, 1, 2)[number % 5],
    )


def write_images(folder, suffix=".jpg"):
    folder.mkdir(parents=True)
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (22, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number + 1:06d}{suffix}")


def write_original(root, images="img_align_celeba", anno="Anno", evaluation="Eval"):
    write_images(root / "Img" / images if anno else root / images)
    (root / anno).mkdir(exist_ok=True)
    (root / evaluation).mkdir(exist_ok=True)
    rows = [(f"{number + 1:06d}.jpg", *values(number)) for number in range(COUNT)]

    def table(name, header, column):
        lines = [f"{row[0]}  {' '.join(f'{value:>3}' for value in row[column])}" for row in rows]
        (root / anno / name).write_text(
            "\n".join([f"{COUNT}", " ".join(header) + " ", *lines]) + "\n"
        )

    table("list_attr_celeba.txt", ATTRIBUTES, 1)
    table("list_landmarks_align_celeba.txt", POINTS, 3)
    table("list_landmarks_celeba.txt", POINTS, 3)
    table("list_bbox_celeba.txt", ["image_id", "x_1", "y_1", "width", "height"], 4)
    (root / anno / "identity_CelebA.txt").write_text(
        "".join(f"{row[0]} {row[2]}\n" for row in rows)
    )
    (root / evaluation / "list_eval_partition.txt").write_text(
        "".join(f"{row[0]} {row[5]}\n" for row in rows)
    )


def write_kaggle(root):
    write_images(root / "img_align_celeba" / "img_align_celeba")
    rows = [(f"{number + 1:06d}.jpg", *values(number)) for number in range(COUNT)]

    def table(name, header, pick):
        lines = [",".join(map(str, [row[0], *pick(row)])) for row in rows]
        (root / name).write_text("\n".join([",".join(["image_id", *header]), *lines]) + "\n")

    table("list_attr_celeba.csv", ATTRIBUTES, lambda row: row[1])
    table("list_landmarks_align_celeba.csv", POINTS, lambda row: row[3])
    table("list_bbox_celeba.csv", ["x_1", "y_1", "width", "height"], lambda row: row[4])
    table("list_eval_partition.csv", ["partition"], lambda row: [row[5]])


def facts_of(shards):
    """source → what the JSON member says, and the split."""
    found = {}
    for name in shards.manifest.splits:
        samples = webdataset.WebDataset(
            [str(path) for path in shards.split(name).files], shardshuffle=False
        )
        found |= {
            json.loads(sample["json"])["source"]: (name, json.loads(sample["json"]), sample)
            for sample in samples
        }
    return found


@pytest.fixture
def original(tmp_path):
    write_original(tmp_path / "celeba")
    return tmp_path / "celeba"


def test_everything_is_kept_of_the_original_files(original, tmp_path):
    shards = make("celeba", tmp_path / "set", original)
    assert verify(shards.folder) == [] and shards.manifest.rejects == 0
    assert shards.summary()["samples"] == {"train": 24, "val": 8, "test": 8}
    assert shards.manifest.attribute_names == ATTRIBUTES and shards.class_names == []
    facts = facts_of(shards)
    for number in range(COUNT):
        split, found, sample = facts[f"{number + 1:06d}.jpg"]
        attributes, identity, landmarks, _, part = values(number)
        assert split == ("train", "val", "test")[part] and "cls" not in sample
        assert (
            found["attributes"] == attributes
            and found["identity"] == identity
            and found["landmarks"] == landmarks
        )
        assert "box" not in found
        assert (
            sample["jpg"] == (original / f"Img/img_align_celeba/{number + 1:06d}.jpg").read_bytes()
        )


def test_attributes_come_with_the_batches(original, tmp_path):
    shards = make("celeba", tmp_path / "set", original)
    facts = facts_of(shards)
    by_key = {sample["__key__"]: found["attributes"] for _, found, sample in facts.values()}
    batch = next(eval_loader(shards, DataConfig(shards=shards.folder), "train", 30))
    assert batch["attributes"].tolist() == [by_key[key] for key in batch["sample_ids"]]


@pytest.mark.parametrize(
    ("first", "then"),
    [({"label": "Male"}, {"label": "Young"}), ({}, {"images": "wild"}), ({}, {"partial": True})],
)
def test_other_options_need_another_folder(original, tmp_path, first, then):
    """Other classes, images or parts would be another set, though the source is the same."""
    make("celeba", tmp_path / "set", original, **first)
    with pytest.raises(InputError, match=f"was made with {next(iter(then))} = .*, not "):
        make("celeba", tmp_path / "set", original, **then)


def test_kaggles_copy_gives_the_same(original, tmp_path):
    write_kaggle(tmp_path / "kaggle")
    one, two = (
        make("celeba", tmp_path / "one", original),
        make("celeba", tmp_path / "two", tmp_path / "kaggle"),
    )
    assert {name: split.samples for name, split in one.manifest.splits.items()} == {
        name: split.samples for name, split in two.manifest.splits.items()
    }
    first, second = facts_of(one), facts_of(two)
    for name, (split, found, sample) in first.items():
        assert second[name][0] == split and second[name][2]["jpg"] == sample["jpg"]
        assert second[name][1] == {key: value for key, value in found.items() if key != "identity"}


def test_images_in_a_zip_and_files_beside_them(tmp_path):
    write_original(tmp_path / "celeba", anno="", evaluation="")
    make("celeba", tmp_path / "one", tmp_path / "celeba")
    folder = tmp_path / "celeba/img_align_celeba"
    with zipfile.ZipFile(tmp_path / "celeba/img_align_celeba.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"img_align_celeba/{path.name}")
            path.unlink()
    folder.rmdir()
    make("celeba", tmp_path / "two", tmp_path / "celeba")
    shutil.rmtree(tmp_path / "celeba")
    one, two = (facts_of(ShardSet.open(tmp_path / name)) for name in ("one", "two"))
    assert sorted(sample["jpg"] for *_, sample in one.values()) == sorted(
        sample["jpg"] for *_, sample in two.values()
    )
    assert {name.split("/")[-1] for name in two} == set(one) and len(one) == COUNT


def test_images_in_the_wild_have_boxes(tmp_path):
    write_original(tmp_path / "celeba", images="img_celeba")
    facts = facts_of(make("celeba", tmp_path / "set", tmp_path / "celeba", images="wild"))
    assert facts["000004.jpg"][1]["box"] == [3, 2, 30, 40]
    with pytest.raises(InputError, match="aligned"):
        make("celeba", tmp_path / "other", tmp_path / "celeba")


@pytest.mark.parametrize(
    ("label", "names", "of"),
    [
        ("Male", ["not Male", "Male"], lambda number: int(values(number)[0][2] > 0)),
        ("identity", [str(number) for number in range(1, 8)], lambda number: number % 7),
    ],
)
def test_the_class_is_chosen(original, tmp_path, label, names, of):
    shards = make("celeba", tmp_path / "set", original, label=label)
    assert shards.class_names == names
    for name, (_, _, sample) in facts_of(shards).items():
        assert int(sample["cls"]) == of(int(name[:6]) - 1)


def edit(name, change):
    def damage(root):
        path = next(root.rglob(name))
        path.write_text(change(path.read_text()))

    return damage


DAMAGES = {
    "attributes missing": (
        lambda root: next(root.rglob("list_attr*")).unlink(),
        "has no list_attr_celeba.txt or",
    ),
    "partition missing": (
        lambda root: next(root.rglob("list_eval*")).unlink(),
        "has no list_eval_partition.txt or",
    ),
    "count": (
        edit("list_attr*", lambda t: t.replace("40\n", "41\n", 1)),
        "line 1 says 41 rows, but there are 40",
    ),
    "no count": (
        edit("list_attr*", lambda t: t.split("\n", 1)[1]),
        "line 1: must be the number of rows",
    ),
    "short row": (
        edit("list_attr*", lambda t: t.replace("000002.jpg    1  -1", "000002.jpg  1", 1)),
        "line 4: 4 columns, not 5",
    ),
    "word": (
        edit("list_eval*", lambda t: t.replace("000003.jpg 0", "000003.jpg train")),
        "line 3: .*'train'",
    ),
    "value": (
        edit("list_attr*", lambda t: t.replace("000002.jpg    1", "000002.jpg    2")),
        "line 4: 5_o_Clock_Shadow = 2: .*-1, 1",
    ),
    "part": (
        edit("list_eval*", lambda t: t.replace("000003.jpg 0", "000003.jpg 3")),
        "line 3: partition = 3: .*0, 1, 2",
    ),
    "twice": (edit("list_eval*", lambda t: t + "000003.jpg 0\n"), r"line 41: .*000003\.jpg"),
    "half extracted": (
        lambda root: [path.unlink() for path in sorted(root.rglob("*.jpg"))[20:]],
        r"20 of 40 .*\.jpg",
    ),
    "no annotation for many": (
        edit("list_eval*", lambda t: "\n".join(t.split("\n")[:20]) + "\n"),
        "not in list_eval",
    ),
    "other images": (
        lambda root: [
            path.rename(path.with_name("x" + path.name)) for path in sorted(root.rglob("*.jpg"))
        ],
        "none of its 40 images is in",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_wrong_files_are_named(original, tmp_path, damage, words):
    damage(original)
    with pytest.raises((InputError, WorkError), match=words) as caught:
        make("celeba", tmp_path / "set", original)
    assert "\n" not in str(caught.value) and not list((tmp_path / "set").rglob("*.tar"))


def test_few_missing_ones_are_rows(original, tmp_path):
    (original / "Img/img_align_celeba/000007.jpg").unlink()
    Image.new("RGB", (3, 3)).save(original / "Img/img_align_celeba/999999.jpg")
    shards = make("celeba", tmp_path / "set", original)
    assert shards.manifest.rejects == 2 and sum(shards.summary()["samples"].values()) == 39
    table = (tmp_path / "set/rejects.csv").read_text()
    assert "000007.jpg" in table and "999999.jpg" in table and verify(shards.folder) == []


def test_an_image_without_attributes_is_one_row(original, tmp_path):
    edit("list_attr*", lambda t: "39" + t[2 : t.rindex("000040.jpg")])(original)
    shards = make("celeba", tmp_path / "set", original)
    assert shards.manifest.rejects == 1
    ((name, reason),) = rejected(tmp_path / "set").items()
    assert name.endswith("000040.jpg") and reason.startswith("not in list_attr_celeba.txt")


@pytest.mark.parametrize("file", ["Anno/identity_CelebA.txt", "Img/img_align_celeba/000001.jpg"])
def test_files_that_change_after_the_plan(original, tmp_path, file):
    plan = make_shard_plan(PrepareConfig(dataset="celeba", source=original, out=tmp_path / "set"))
    (original / file).write_bytes((original / file).read_bytes())
    with pytest.raises(WorkError, match=re.escape(str(file))):
        for number in range(len(plan.files)):
            write_shard(plan, number)


def test_a_misspelt_attribute(original, tmp_path):
    with pytest.raises(InputError, match="'Male'"):
        make("celeba", tmp_path / "set", original, label="male")
    (original / "Anno/identity_CelebA.txt").unlink()
    with pytest.raises(InputError, match="identity_CelebA"):
        make("celeba", tmp_path / "set", original, label="identity")


def keep_rows(name, count):
    """Leave only the first rows of a table, whose first line still says 40."""
    return edit(name, lambda text: "\n".join(text.split("\n")[: count + 2]) + "\n")


PARTS = {
    "some images": (
        lambda root: [path.unlink() for path in sorted(root.rglob("*.jpg"))[20:]],
        {"train": 12, "val": 4, "test": 4},
        "20 images of its tables are not there",
    ),
    "none of the test images": (
        lambda root: [
            path.unlink()
            for path in root.rglob("*.jpg")
            if int(path.stem) % 5 == 0 or int(path.stem) < 5
        ],
        {"train": 19, "val": 7, "test": 2},
        "12 images of its tables are not there",
    ),
    "ten rows of attributes": (
        keep_rows("list_attr*", 10),
        {"train": 6, "val": 2, "test": 2},
        "10 of the 40 rows of list_attr_celeba.txt",
    ),
    "no partition": (
        lambda root: next(root.rglob("list_eval*")).unlink(),
        {"train": 36, "test": 4},
        "no partition",
    ),
    "half a partition": (
        edit("list_eval*", lambda text: "\n".join(text.split("\n")[:20]) + "\n"),
        {"train": 32, "val": 4, "test": 4},
        "CelebA",
    ),
    "only images and attributes": (
        lambda root: [
            path.unlink() for path in root.rglob("*.txt") if "list_attr" not in path.name
        ],
        {"train": 36, "test": 4},
        "no partition",
    ),
}


@pytest.mark.parametrize(("lose", "samples", "words"), PARTS.values(), ids=PARTS.keys())
def test_a_part_is_taken_when_that_is_asked_for(original, tmp_path, capfd, lose, samples, words):
    lose(original)
    with pytest.raises((InputError, WorkError), match="--partial takes what is there"):
        make("celeba", tmp_path / "whole", original)
    shards = make("celeba", tmp_path / "set", original, partial=True)
    assert shards.summary()["samples"] == samples and shards.manifest.rejects == 0
    assert words in capfd.readouterr().err and verify(shards.folder) == []
    for name, (split, facts, _) in facts_of(shards).items():
        attributes, _, _, _, part = values(int(name[:6]) - 1)
        assert facts["attributes"] == attributes
        assert "val" not in samples or part != 1 or split in ("val", "train")


def test_a_set_of_an_earlier_version_goes_on(original, tmp_path):
    """Its plan says nothing of parts."""
    shards = make("celeba", tmp_path / "set", original)
    plan = tmp_path / "set/plan.json"
    stored = json.loads(plan.read_text(encoding="utf-8"))
    del stored["settings"]["partial"]
    plan.write_text(json.dumps(stored), encoding="utf-8")
    assert make("celeba", tmp_path / "set", original).digest == shards.digest
    with pytest.raises(InputError, match="made with partial = False, not True"):
        make("celeba", tmp_path / "set", original, partial=True)
