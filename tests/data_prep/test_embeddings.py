"""Embeddings of texts beside images: from files and members to batches."""

import csv
import io
import shutil

import numpy as np
import pytest
import torch
import webdataset

from r2id.config import DataConfig
from r2id.data.loader import eval_loader, image_loader
from r2id.data.records import decode
from r2id.data.shards import ShardSet
from r2id.data.stream import stream_loader
from r2id.data.verify import verify
from r2id.errors import InputError
from tests.data_prep.conftest import files_of, make, write_images
from tests.data_prep.test_webdataset import picture, write_tar

COUNT = 20


def embedding(number, shape):
    return (
        np.random.default_rng(number).normal(size=shape).astype(("<f2", "<f4", "<f8")[number % 3])
    )


def write(folder, shape=(2, 3), names=None):
    """Images whose colours are their numbers, and their embeddings."""
    names = names or [
        f"{'ab'[number % 2]}/{number}.{('png', 'PNG')[number % 2]}" for number in range(COUNT)
    ]
    write_images(folder, names)
    for number, name in enumerate(names):
        np.save((folder / name).with_suffix(".npy"), embedding(number, shape))
    return names


def by_number(shards):
    """Number of an image → its embedding in the index; that in the tar is the same."""
    found = {}
    for name in shards.manifest.splits:
        split = ShardSet.open(shards.folder, embeddings=True).split(name)
        assert shards.split(name).embedding is None, "nobody asked for it"
        samples = webdataset.WebDataset([str(path) for path in split.files], shardshuffle=False)
        beside = {sample["__key__"]: np.load(io.BytesIO(sample["npy"])) for sample in samples}
        for index in range(len(split)):
            assert np.array_equal(beside[split.key(index)], split.embedding[index])
            found[round(float(decode(split.read(index)).mean()))] = split.embedding[index]
    return found


def rejects_of(shards):
    with (shards.folder / "rejects.csv").open(newline="") as file:
        return {row["source"]: row["reason"] for row in csv.DictReader(file)}


@pytest.mark.parametrize(
    ("kind", "shape"), [("folder", (2, 3)), ("tar", (5,)), ("gztar", (2, 3)), ("zip", (5,))]
)
def test_files_beside_images(tmp_path, kind, shape):
    write(tmp_path / "in", shape)
    source = (
        tmp_path / "in"
        if kind == "folder"
        else shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path / "in")
    )
    shards = make("folder", tmp_path / "set", source)
    assert verify(shards.folder) == [] and shards.class_names == ["a", "b"]
    assert shards.manifest.embedding_shape == list(shape) and shards.manifest.rejects == 0
    found = by_number(shards)
    assert sorted(found) == list(range(COUNT))
    for number, values in found.items():
        assert values.dtype == np.float16 and np.array_equal(
            values, embedding(number, shape).astype(np.float16)
        )


def test_they_come_with_the_batches(tmp_path):
    write(tmp_path / "in")
    folder = make("folder", tmp_path / "set", tmp_path / "in", shard_mb=0.02).folder
    shards, data = (
        ShardSet.open(folder, embeddings=True),
        DataConfig(shards=folder, size=(6, 5), flip=False),
    )
    assert len(shards.split("train").files) > 1, "of several shards"
    steps = {
        "split": "train",
        "batch": 8,
        "micro_batch": 4,
        "seed": 0,
        "start_step": 1,
        "total_steps": 2,
    }
    streamed = ShardSet.open(folder, str(folder), embeddings=True)
    batches = [
        *eval_loader(shards, data, "test", 4),
        *next(image_loader(shards, data, **steps)),
        *next(stream_loader(streamed, data, **steps)),
    ]
    assert len(batches) == 5
    for batch in batches:
        images = (
            batch["image"] if batch["image"].dtype == torch.uint8 else (batch["image"] + 1) * 127.5
        )
        for image, told in zip(images.float(), batch["embedding"].numpy(), strict=True):
            number = round(float(image.mean()))
            assert told.dtype == np.float16 and np.array_equal(
                told, embedding(number, (2, 3)).astype(np.float16)
            )
    assert "embedding" not in next(eval_loader(ShardSet.open(folder), data, "test", 4))


def test_images_whose_embedding_cannot_be_used_are_rejects(tmp_path):
    folder = tmp_path / "in"
    names = write(folder)
    bad = {
        3: np.zeros(6, "<f4"),
        4: np.full((2, 3), np.nan),
        5: np.full((2, 3), 1e6),
        6: np.zeros((2, 3), int),
    }
    for number, values in bad.items():
        np.save((folder / names[number]).with_suffix(".npy"), values)
    (folder / names[0]).with_suffix(".npy").write_bytes(b"text")
    (folder / names[8]).with_suffix(".npy").unlink()
    (folder / names[9]).with_suffix(".npy").unlink()
    (folder / names[9]).with_suffix(".npy").symlink_to(folder / "nowhere")
    shards = make("folder", tmp_path / "set", folder)
    assert verify(shards.folder) == [] and sorted(by_number(shards)) == [1, 2, 7, *range(10, COUNT)]
    rejects = rejects_of(shards)
    for number, words in {
        0: "its embedding: no .npy file",
        3: "its embedding: of shape [6], not [2, 3]",
        4: "not finite in float16",
        5: "not finite in float16",
        6: "values of type int64",
        8: "no embedding beside it",
        9: "no embedding beside it",
    }.items():
        assert words in rejects.pop(names[number])
    assert rejects == {}


def test_files_that_belong_to_no_image_change_nothing(tmp_path):
    """Byte for byte, the plan too, but for where the source is."""
    write_images(tmp_path / "in", [f"a/{number}.png" for number in range(8)])
    before = files_of(make("folder", tmp_path / "set", tmp_path / "in").folder)
    assert b"embedding" not in b"".join(before[name] for name in ("manifest.json", "plan.json"))
    np.save(tmp_path / "in/a/else.npy", np.zeros(3))
    np.save(tmp_path / "in/a/.1.npy", np.zeros(3))
    np.save(tmp_path / "in/1.npy", np.zeros(3))
    assert files_of(make("folder", tmp_path / "again", tmp_path / "in").folder) == before


def test_a_table_of_labels_and_a_changed_embedding(tmp_path):
    names = write(tmp_path / "in", names=[f"{number}.png" for number in range(COUNT)])
    table = tmp_path / "labels.csv"
    table.write_text(
        "path,label,split\n"
        + "".join(f"{name},{number % 3},train\n" for number, name in enumerate(names))
    )
    shards = make("folder", tmp_path / "set", tmp_path / "in", labels=table)
    split = ShardSet.open(shards.folder, embeddings=True).split("train")
    for index in range(COUNT):
        number = round(float(decode(split.read(index)).mean()))
        assert split.label[index] == number % 3
        assert np.array_equal(split.embedding[index], embedding(number, (2, 3)).astype(np.float16))
    np.save(tmp_path / "in/4.npy", np.zeros((2, 4)))
    with pytest.raises(InputError, match=f"{tmp_path / 'set'}: .*another source"):
        make("folder", tmp_path / "set", tmp_path / "in", labels=table)


def test_shards_stay_within_their_length(tmp_path):
    write(tmp_path / "in", (40, 100))
    shards = make("folder", tmp_path / "set", tmp_path / "in", shard_mb=0.06)
    sizes = [entry.bytes for split in shards.manifest.splits.values() for entry in split.shards]
    assert len(sizes) > 4 and max(sizes) <= 60_000


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            np.zeros((2, 2, 2)),
            r"are no embeddings: of shape \[2, 2, 2\]; must be \[D\] or \[T, D\]",
        ),
        (np.arange(3), "are no embeddings: values of type int64"),
        (np.zeros((0, 4)), r"of shape \[0, 4\]"),
    ],
)
def test_arrays_that_are_no_embeddings(tmp_path, array, words):
    names = write(tmp_path / "in")
    for name in names:
        np.save((tmp_path / "in" / name).with_suffix(".npy"), array)
    with pytest.raises(InputError, match=words):
        make("folder", tmp_path / "set", tmp_path / "in")


def test_members_of_a_webdataset(tmp_path):
    def sample(number, **others):
        content = io.BytesIO()
        np.save(content, embedding(number, (5,)))
        return {
            "__key__": f"k{number}",
            "png": picture(number),
            "cls": number % 2,
            "json": {"n": number},
            "npy": content.getvalue(),
            "depth.npy": np.zeros(3),
            **others,
        }

    odd = io.BytesIO()
    np.save(odd, np.zeros(4, "<f4"))
    without = sample(1)
    del without["npy"]
    write_tar(
        tmp_path / "in/train-0.tar",
        [sample(0), without, sample(2, npy=odd.getvalue()), sample(3, npy=b"no array")],
    )
    write_tar(tmp_path / "in/train-1.tar", [sample(number) for number in range(4, COUNT)])
    shards = make("webdataset", tmp_path / "set", tmp_path / "in")
    assert verify(shards.folder) == [] and shards.manifest.embedding_shape == [5]
    found = by_number(shards)
    assert sorted(found) == [0, *range(4, COUNT)]
    assert all(
        np.array_equal(values, embedding(number, (5,)).astype(np.float16))
        for number, values in found.items()
    )
    rejects = rejects_of(shards)
    assert (
        set(rejects) == {"k1.png", "k2.png", "k3.png"}
        and "no embedding beside it" in rejects["k1.png"]
    )
    assert "of shape [4], not [5]" in rejects["k2.png"] and "no .npy file" in rejects["k3.png"]
    again = by_number(make("webdataset", tmp_path / "two", shards.folder))
    assert again.keys() == found.keys() and all(
        np.array_equal(again[number], found[number]) for number in found
    )
