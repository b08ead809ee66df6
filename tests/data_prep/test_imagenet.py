"""ImageNet-1k in its four shapes, small but built as they are."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import savemat

from data_prep.prepare import make_shard_plan, write_shard
from r2id.config import DataConfig, PrepareConfig
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import make

WNIDS = ["n01440764", "n01443537", "n02105855", "n03995372"]
IDS = {
    1: "n02105855",
    2: "n01440764",
    3: "n03995372",
    4: "n01443537",
}  # the kit's order is not that of the names
ODD = {"CMYK": ("JPEG", "CMYK"), "a PNG": ("PNG", "RGBA"), "gray": ("JPEG", "L")}


def picture(number, kind="JPEG", mode="RGB"):
    pixels = np.random.default_rng(number).integers(
        0, 256, (12 + number % 5, 10 + number % 3, 3), dtype=np.uint8
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


TRAIN = {
    f"{wnid}/{wnid}_{number}.JPEG": picture(
        10 * position + number, *list(ODD.values())[number] if number < 3 else ()
    )
    for position, wnid in enumerate(WNIDS)
    for number in range(6)
}
TRUTH = [2, 1, 4, 4, 3, 2, 1, 3]
VAL = {
    f"ILSVRC2012_val_{number + 1:08d}.JPEG": picture(100 + number) for number in range(len(TRUTH))
}
TEST = {f"ILSVRC2012_test_{number + 1:08d}.JPEG": picture(200 + number) for number in range(3)}


def tar_of(members, order=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in order or members:
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            archive.addfile(info, io.BytesIO(members[name]))
    return buffer.getvalue()


def kit_of():
    dtype = [
        ("ILSVRC2012_ID", "O"),
        ("WNID", "O"),
        ("words", "O"),
        ("gloss", "O"),
        ("num_children", "O"),
        ("children", "O"),
        ("wordnet_height", "O"),
        ("num_train_images", "O"),
    ]
    leaves = [
        (number, wnid, f"word {number}", "gloss", 0, [], 0, 6) for number, wnid in IDS.items()
    ]
    inner = [(5, "n00001740", "entity", "gloss", 2, [1, 2], 3, 0)]  # not a class
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(leaves + inner, dtype=dtype).reshape(-1, 1)})
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {
        "ILSVRC2012_devkit_t12/data/meta.mat": buffer.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth,
        "ILSVRC2012_devkit_t12/readme.txt": b"x",
    }


def write_tars(root):
    root.mkdir()
    inner = {
        f"{wnid}.tar": tar_of(
            {name.split("/")[1]: data for name, data in TRAIN.items() if name.startswith(wnid)}
        )
        for wnid in WNIDS
    }
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner, sorted(inner, reverse=True)))
    (root / "ILSVRC2012_img_val.tar").write_bytes(
        tar_of(VAL, sorted(VAL, key=lambda name: name[::-1]))
    )
    (root / "ILSVRC2012_img_test_v10102019.tar").write_bytes(
        tar_of({f"test/{name}": data for name, data in TEST.items()})
    )
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        for name, data in kit_of().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_kaggle(root):
    for part, images in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        for name, data in images.items():
            path = root / "ILSVRC/Data/CLS-LOC" / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    rows = [
        f"{name[:-5]},{IDS[number]} 10 20 30 40 {IDS[number]} 1 2 3 4"
        for name, number in zip(VAL, TRUTH, strict=True)
    ]
    (root / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *rows[::-1]]) + "\n"
    )
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} some, words\n" for wnid in WNIDS))


def write_folders(root):
    val = {
        f"{IDS[number]}/{name}": data
        for (name, data), number in zip(VAL.items(), TRUTH, strict=True)
    }
    for part, images in (("train", TRAIN), ("val", val)):
        for name, data in images.items():
            path = root / part / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_parquet(root):
    (root / "data").mkdir(parents=True)
    features = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ]
    )
    names = '{"info": {"features": {"label": {"names": ["n01440764", "n01443537", "n02105855", "n03995372"]}}}}'
    train = [
        (name, data, WNIDS.index(name[:9]))
        for name, data in sorted(TRAIN.items(), key=lambda pair: pair[0][::-1])
    ]
    val = [
        (name, data, WNIDS.index(IDS[number]))
        for (name, data), number in zip(VAL.items(), TRUTH, strict=True)
    ]
    test = [(name, data, -1) for name, data in TEST.items()]
    for split, rows, files in (("train", train, 2), ("validation", val, 1), ("test", test, 1)):
        for number in range(files):
            part = [
                {"image": {"bytes": data, "path": name.split("/")[-1]}, "label": label}
                for name, data, label in rows[number::files]
            ]
            table = pa.Table.from_pylist(part, features.with_metadata({"huggingface": names}))
            pq.write_table(
                table, root / f"data/{split}-{number:05d}-of-{files:05d}.parquet", row_group_size=5
            )


SHAPES = {
    "tars": write_tars,
    "kaggle": write_kaggle,
    "parquet": write_parquet,
    "folders": write_folders,
}


def content(shards):
    """split → sorted (class, image)."""
    found = {}
    for name in shards.manifest.splits:
        split = shards.split(name)
        labels = [shards.class_names[label] if label >= 0 else None for label in split.label]
        found[name] = sorted((str(label), split.read(index)) for index, label in enumerate(labels))
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_images_and_classes(shape, tmp_path):
    SHAPES[shape](tmp_path / "source")
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
    if shape != "folders":
        expected["test"] = sorted(("None", data) for data in TEST.values())
    assert content(shards) == expected
    workers = 2 if shape == "tars" else 1
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
    with pytest.raises(InputError, match=r"has no ILSVRC2012_devkit_t12\.tar\.gz"):
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
        "truncated or damaged",
    ),
    "cut between members": (
        lambda root: cut_at_member(root / "ILSVRC2012_img_val.tar"),
        "truncated or damaged",
    ),
    "a flipped bit in a header": (damage_inner, r"n02105855\.tar: .*truncated or damaged"),
    "no tar": (
        lambda root: (root / "ILSVRC2012_img_val.tar").write_text("<html>" * 999),
        "no tar archive",
    ),
    "a validation image more": (
        lambda root: (root / "ILSVRC2012_img_val.tar").write_bytes(tar_of({**VAL, "x.JPEG": b""})),
        "9 images, but the development kit has 8 labels",
    ),
    "not in class tars": (
        lambda root: (root / "ILSVRC2012_img_train.tar").write_bytes(
            tar_of({"a.tar": tar_of(VAL)})
        ),
        "is not in a tar named by a WordNet id",
    ),
    "kit damaged": (lambda root: cut(root / "ILSVRC2012_devkit_t12.tar.gz", 100), "cannot be read"),
}


def cut(path, size):
    path.write_bytes(
        path.read_bytes()[:-size] if path.suffix == ".gz" else path.read_bytes()[:size]
    )


def cut_at_member(path):
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[4].offset
    cut(path, offset)


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_tars_are_named(tmp_path, damage, words):
    write_tars(tmp_path / "source")
    damage(tmp_path / "source")
    with pytest.raises(InputError, match=words) as caught:
        make("imagenet", tmp_path / "set", tmp_path / "source")
    assert "\n" not in str(caught.value) and not (tmp_path / "set").exists()


def test_a_tar_that_changes_after_the_plan(tmp_path):
    write_tars(tmp_path / "source")
    plan = make_shard_plan(
        PrepareConfig(dataset="imagenet", source=tmp_path / "source", out=tmp_path / "set")
    )
    path = tmp_path / "source/ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes())
    with pytest.raises(WorkError, match=r"img_train\.tar: changed since"):
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
    assert "val/ILSVRC2012_val_00000001.JPEG,no label in LOC_val" in table
    assert 'ILSVRC2012_val_00009999,"in LOC_val_solution.csv, but there is no such image"' in table


def test_kaggles_tables_may_lie_beside_the_folder(tmp_path):
    write_kaggle(tmp_path / "source")
    shards = make("imagenet", tmp_path / "set", tmp_path / "source/ILSVRC")
    assert (
        shards.summary()["samples"] == {"test": 3, "train": 24, "val": 8}
        and shards.class_names == WNIDS
    )
    (tmp_path / "source/LOC_val_solution.csv").unlink()
    with pytest.raises(InputError, match=r"has no LOC_val_solution\.csv, which has the labels"):
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
    with pytest.raises(InputError, match="not a readable Parquet file"):
        make("imagenet", tmp_path / "other", tmp_path / "source")


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path):
    write_parquet(tmp_path / "source")
    path = tmp_path / "source/data/train-00001-of-00002.parquet"
    with pq.ParquetFile(path) as file:
        column = file.metadata.row_group(1).column(0)
    data, page = (
        bytearray(path.read_bytes()),
        column.dictionary_page_offset or column.data_page_offset,
    )
    data[page : page + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    shards = make("imagenet", tmp_path / "set", tmp_path / "source")
    table = (tmp_path / "set/rejects.csv").read_text()
    assert (
        shards.manifest.rejects == 5
        and table.count("train-00001-of-00002.parquet: row group 1 cannot be read") == 5
    )


def test_an_older_parquet_file_in_its_place(tmp_path):
    write_parquet(tmp_path / "source")
    plan = make_shard_plan(
        PrepareConfig(dataset="imagenet", source=tmp_path / "source", out=tmp_path / "set")
    )
    path = tmp_path / "source/data/test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    os.utime(path, (0, 0))
    with pytest.raises(WorkError, match=r"test-00000-of-00001\.parquet: changed since"):
        write_shard(plan, 0)


def test_what_is_missing_is_said(tmp_path, capfd):
    write_tars(tmp_path / "tars")
    (tmp_path / "tars/ILSVRC2012_img_val.tar").unlink()
    make("imagenet", tmp_path / "one", tmp_path / "tars")
    assert (
        "ImageNet as published (ILSVRC2012_img_train.tar, ILSVRC2012_img_test_v10102019.tar), no val images, 27 images "
        "(train 24, test 3), 4 classes" in capfd.readouterr().err
    )
    write_parquet(tmp_path / "parquet")
    (tmp_path / "parquet/data/train-00001-of-00002.parquet").unlink()
    (tmp_path / "parquet/data/validation-00000-of-00001.parquet").unlink()
    make("imagenet", tmp_path / "two", tmp_path / "parquet")
    assert (
        "ImageNet in Parquet files, 1 of 1 test files, 1 of 2 train files, no val images"
        in capfd.readouterr().err
    )


def test_a_class_that_the_kit_does_not_know(tmp_path):
    write_tars(tmp_path / "source")
    train = tmp_path / "source/ILSVRC2012_img_train.tar"
    train.write_bytes(tar_of({"n99999999.tar": tar_of({"x.JPEG": picture(1)})}))
    with pytest.raises(
        InputError, match=r"img_train\.tar: class n99999999 is none of the 4 of the development kit"
    ):
        make("imagenet", tmp_path / "set", tmp_path / "source")


def test_what_is_no_imagenet(tmp_path):
    (tmp_path / "source/cats").mkdir(parents=True)
    with pytest.raises(InputError, match="no ImageNet: neither"):
        make("imagenet", tmp_path / "set", tmp_path / "source")
    with pytest.raises(InputError, match="no such folder"):
        make("imagenet", tmp_path / "set", tmp_path / "nowhere")


def test_real_photos(real_data, tmp_path):
    """300 photos in, 300 audited: verified, and met by the loader, each once."""
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
    assert len(set(seen)) == 300 and len(seen) == steps * 4
