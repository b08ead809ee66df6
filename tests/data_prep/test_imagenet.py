"""ImageNet-1k in its four layouts: all give the same samples; what is damaged is named."""

import json
import os
import re
import resource
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.imagenet.parquet import ParquetImagenet
from data_prep.items import Item
from data_prep.prepare import make_shard_plan, write_shard
from r2id.config import DataConfig, PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import make
from tests.data_prep.imagenet_layouts import (
    IDS,
    LAYOUTS,
    TEST,
    TRAIN,
    TRUTH,
    VAL,
    WNIDS,
    picture,
    tar_of,
    write_kaggle,
    write_parquet,
    write_tars,
)


def content(shards):
    """split → sorted (class, image)."""
    found = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        labels = [shards.class_names[label] if label >= 0 else None for label in split.label]
        found[name] = sorted((str(label), split.read(index)) for index, label in enumerate(labels))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images_and_classes(layout, tmp_path):
    LAYOUTS[layout](tmp_path / "source")
    shards = make("imagenet", tmp_path / "set", tmp_path / "source", shard_mb=0.05)
    assert (
        verify(shards.folder) == [] and shards.manifest.rejects == 0 and shards.class_names == WNIDS
    )
    expected = {
        "train": sorted((name[:9], data) for name, data in TRAIN.items()),
        "val": sorted(
            (IDS[number], data) for data, number in zip(VAL.values(), TRUTH, strict=True)
        ),
    }
    if layout != "folders":
        expected["test"] = sorted(("None", data) for data in TEST.values())
    assert content(shards) == expected
    workers = 2 if layout == "tars" else 1
    again = make(
        "imagenet", tmp_path / "again", tmp_path / "source", shard_mb=0.05, workers=workers
    )
    assert again.digest == shards.digest


def test_what_is_odd_about_it_is_kept(tmp_path):
    write_tars(tmp_path / "source")
    split = make("imagenet", tmp_path / "set", tmp_path / "source").split("train")
    assert len(split) == 24
    with tarfile.open(split.files[0]) as archive:
        assert sum(name.endswith(".png") for name in archive.getnames()) == 4
        facts = [
            json.loads(archive.extractfile(member).read())
            for member in archive
            if member.name.endswith("json")
        ]
    assert {fact["source"] for fact in facts} == {f"train/{name}" for name in TRAIN}


def test_parts_may_be_missing(tmp_path, capfd):
    write_tars(tmp_path / "source")
    (tmp_path / "source/ILSVRC2012_img_train.tar").unlink()
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    assert set(shards.manifest.splits) == {"val", "test"} and shards.class_names == WNIDS
    (tmp_path / "source/ILSVRC2012_devkit_t12.tar.gz").unlink()
    with pytest.raises(InputError, match=r"ILSVRC2012_devkit_t12\.tar\.gz"):
        make("imagenet", tmp_path / "other", tmp_path / "source")


def damage_inner(root):
    path = root / "ILSVRC2012_img_train.tar"
    data = bytearray(path.read_bytes())
    at = data.find(b"n02105855_3.JPEG")
    data[at + 3] ^= 1  # in a header, whose checksum is then wrong
    path.write_bytes(data)


DAMAGES = {
    "cut in a member": (
        lambda root: cut(root / "ILSVRC2012_img_train.tar", 3000),
        r"img_train\.tar",
    ),
    "cut between members": (
        lambda root: cut_at_member(root / "ILSVRC2012_img_val.tar"),
        r"img_val\.tar",
    ),
    "a flipped bit in a header": (damage_inner, r"n02105855\.tar"),
    "no tar": (
        lambda root: (root / "ILSVRC2012_img_val.tar").write_text("<html>" * 999),
        r"img_val\.tar",
    ),
    "a validation image more": (
        lambda root: (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({**VAL, "x.JPEG": b""})),
        r"img_val\.tar: 9 .* 8 ",
    ),
    "not in class tars": (
        lambda root: (root / "ILSVRC2012_img_train.tar").write_bytes(
            tar_of({"a.tar": tar_of(VAL)})
        ),
        r"a/ILSVRC2012_val_00000001\.JPEG",
    ),
    "kit damaged": (
        lambda root: cut(root / "ILSVRC2012_devkit_t12.tar.gz", 100),
        r"devkit_t12\.tar\.gz",
    ),
}


def cut(path, size):
    path.write_bytes(
        path.read_bytes()[:-size] if path.suffix == ".gz" else path.read_bytes()[:size]
    )


def cut_at_member(path):
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    cut(path, offset)


@pytest.mark.parametrize(("damage", "named"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_tars_are_named(tmp_path, damage, named):
    write_tars(tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(InputError, match=named) as caught:
        make("imagenet", tmp_path / "set", tmp_path / "source")
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_a_tar_that_changes_after_the_plan(tmp_path):
    write_tars(tmp_path / "source")
    plan = make_shard_plan(
        PrepareConfig(dataset="imagenet", source=tmp_path / "source", out=tmp_path / "set")
    )
    path = tmp_path / "source/ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes())
    with pytest.raises(WorkError, match=r"img_train\.tar"):
        write_shard(plan, 0)


def test_kaggles_labels_and_images_must_fit(tmp_path):
    write_kaggle(tmp_path / "source")
    solution = tmp_path / "source/LOC_val_solution.csv"
    lines = solution.read_text().splitlines()
    solution.write_text(
        "\n".join([*lines[:-1], "ILSVRC2012_val_00009999,n01440764 1 2 3 4"]) + "\n"
    )
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    table = (tmp_path / "set/rejects.csv").read_text()
    assert shards.manifest.rejects == 2 and len(shards.split("val")) == 7
    assert "val/ILSVRC2012_val_00000001.JPEG," in table and "ILSVRC2012_val_00009999," in table


def test_kaggles_tables_may_lie_beside_the_folder(tmp_path):
    write_kaggle(tmp_path / "source")
    shards = make("imagenet", tmp_path / "set", tmp_path / "source/ILSVRC")
    assert (
        shards.summary()["samples"] == {"test": 3, "train": 24, "val": 8}
        and shards.class_names == WNIDS
    )
    (tmp_path / "source/LOC_val_solution.csv").unlink()
    with pytest.raises(InputError, match=r"LOC_val_solution\.csv"):
        make("imagenet", tmp_path / "other", tmp_path / "source")


def test_parquet_rows_without_an_image(tmp_path):
    write_parquet(tmp_path / "source")
    path = tmp_path / "source/data/validation-00000-of-00001.parquet"
    table = pq.read_table(path).to_pylist()
    table[2]["image"]["bytes"] = None
    table[3]["image"]["bytes"] = b"no picture"
    pq.write_table(pa.Table.from_pylist(table), path)
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    assert shards.manifest.rejects == 2 and len(shards.split("val")) == 6
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(InputError, match=r"validation-00000-of-00001\.parquet"):
        make("imagenet", tmp_path / "other", tmp_path / "source")


def damage_row_group(path):
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
    data, page = (
        bytearray(path.read_bytes()),
        column.dictionary_page_offset or column.data_page_offset,
    )
    data[page : page + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    write_parquet(tmp_path / "source")
    damage_row_group(tmp_path / "source/data/train-00001-of-00002.parquet")
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    table = (tmp_path / "set/rejects.csv").read_text()
    assert shards.manifest.rejects == 5
    assert table.count("train-00001-of-00002.parquet: row group 1") == 5


def test_a_damaged_row_group_is_read_once(tmp_path):
    write_parquet(tmp_path / "source")
    path = tmp_path / "source/data/train-00001-of-00002.parquet"
    damage_row_group(path)
    reader, rejects = ParquetImagenet(path.parent, 10**6), []
    listing, place = reader.listing(), b"%d:1:" % reader.files.index(path)
    items = [Item(**row) for row in listing.items.to_pylist() if row["place"].startswith(place)]

    def without_the_file():
        yield items[0]
        path.unlink()  # a second reading would fail otherwise
        yield from items[1:]

    assert not list(reader.records(without_the_file(), rejects, listing.newest, []))
    assert len(rejects) == 5 and len({reject.reason for reject in rejects}) == 1


def test_a_fault_of_the_system_rejects_no_row(tmp_path):
    write_parquet(tmp_path / "source")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    reader = ParquetImagenet(tmp_path / "source/data", 10**6)
    listing, rejects = reader.listing(), []
    items = [Item(**row) for row in listing.items.to_pylist()]
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        with pytest.raises(WorkError, match=r"\.parquet: cannot be read: Too many open files$"):
            list(reader.records(items, rejects, listing.newest, []))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert not rejects


def write_labels(folder, labels):
    rows = [
        {"image": {"bytes": picture(number), "path": f"{number}.jpg"}, "label": label}
        for number, label in enumerate(labels)
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


@pytest.mark.parametrize("number", [10**9, 2**40])
def test_a_class_number_that_is_none_is_refused(tmp_path, number):
    write_labels(tmp_path / "source", [0, number, 1])
    words = rf"parquet: row group 0: class number {number}, .* 3 samples"
    with pytest.raises(InputError, match=words):
        make("imagenet", tmp_path / "set", tmp_path / "source")


def test_classes_with_gaps_are_numbered_as_they_occur(tmp_path):
    write_labels(tmp_path / "source", [5, 900, 5, 17])
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    assert shards.class_names == ["5", "17", "900"]
    assert sorted(shards.split("train").label.tolist()) == [0, 0, 1, 2]


def test_an_older_parquet_file_in_its_place(tmp_path):
    write_parquet(tmp_path / "source")
    plan = make_shard_plan(
        PrepareConfig(dataset="imagenet", source=tmp_path / "source", out=tmp_path / "set")
    )
    path = tmp_path / "source/data/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    os.utime(path, (0, 0))
    with pytest.raises(WorkError, match=r"test-00000-of-00001\.parquet"):
        write_shard(plan, 0)


def test_what_is_missing_is_said(tmp_path, capfd):
    write_tars(tmp_path / "tars")
    (tmp_path / "tars/ILSVRC2012_img_val.tar").unlink()
    make("imagenet", tmp_path / "one", tmp_path / "tars")
    said = capfd.readouterr().err
    assert "no val images" in said and "train 24, test 3" in said
    write_parquet(tmp_path / "parquet")
    (tmp_path / "parquet/data/train-00001-of-00002.parquet").unlink()
    (tmp_path / "parquet/data/validation-00000-of-00001.parquet").unlink()
    make("imagenet", tmp_path / "two", tmp_path / "parquet")
    said = capfd.readouterr().err
    assert "1 of 2 train files" in said and "no val images" in said


def test_a_class_that_the_kit_does_not_know(tmp_path):
    write_tars(tmp_path / "source")
    train = tmp_path / "source/ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of({"n99999999.tar": tar_of({"x.JPEG": picture(1)})}))
    with pytest.raises(InputError, match="n99999999"):
        make("imagenet", tmp_path / "set", tmp_path / "source")


def test_what_is_no_imagenet(tmp_path):
    (tmp_path / "source/cats").mkdir(parents=True)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "source"))):
        make("imagenet", tmp_path / "set", tmp_path / "source")
    with pytest.raises(InputError, match="nowhere"):
        make("imagenet", tmp_path / "set", tmp_path / "nowhere")


def test_real_photos(real_data, tmp_path):
    """300 photos in, verified; those to train on are met by the loader, each once."""
    from r2id.data.loader import image_loader, split_buckets

    shards = make("imagenet", tmp_path / "set", real_data / "imagenet-sample", shard_mb=8.0)
    assert (
        verify(shards.folder) == [] and shards.num_classes == 300 and shards.manifest.rejects == 0
    )
    data = DataConfig(shards=shards.folder, channels=3, max_pixels=4096)
    steps = split_buckets(shards.split("train"), data).batches(4)
    seen = [
        key
        for step in image_loader(
            shards,
            data,
            split="train",
            batch=4,
            micro_batch=4,
            seed=0,
            start_step=0,
            total_steps=steps,
        )
        for part in step
        for key in part["sample_ids"]
    ]
    assert len(set(seen)) == 270 and len(seen) == steps * 4
