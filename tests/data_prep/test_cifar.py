"""CIFAR-10 and CIFAR-100 as published: pickles as Python 2 wrote them, and binary files."""

import io
import pickle
import struct
import tarfile
import warnings

import numpy as np
import pytest
from PIL import Image

from r2id.data.records import decode
from r2id.data.verify import verify
from r2id.errors import InputError
from tests.data_prep.conftest import files_of, make

NAMES10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES100 = [f"fine_{number}" for number in range(100)]


def pickled(value):
    """Pickle as Python 2 did, protocol 2: texts are bytes, and arrays are NumPy's of that time."""
    return b"\x80\x02" + encoded(value) + b"."


def encoded(value):
    match value:
        case None | bool():
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case bytes():
            return b"T" + struct.pack("<I", len(value)) + value
        case int():
            return b"J" + struct.pack("<i", value)
        case tuple():
            return b"(" + b"".join(map(encoded, value)) + b"t"
        case list():
            return b"](" + b"".join(map(encoded, value)) + b"e"
        case dict():
            parts = [encoded(key) + encoded(content) for key, content in value.items()]
            return b"}(" + b"".join(parts) + b"u"
    dtype = b"cnumpy\ndtype\n" + encoded((b"u1", 0, 1)) + b"R"
    dtype += encoded((3, b"|", None, None, None, -1, -1, 0)) + b"b"
    state = b"(" + encoded(1) + encoded(value.shape) + dtype + encoded(False)
    state += encoded(value.tobytes()) + b"t"
    begun = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n"
    return begun + encoded((0,)) + encoded(b"b") + b"tR" + state + b"b"


def rows(images):
    """Images [N, 32, 32, 3] as rows of planes [N, 3072]."""
    return images.transpose(0, 3, 1, 2).reshape(len(images), -1)


def write_python10(folder, train, test):
    for number in range(5):
        write(folder / f"data_batch_{number + 1}", batch10(*(part[number::5] for part in train)))
    write(folder / "test_batch", batch10(*test))
    names = [name.encode() for name in NAMES10]
    write(folder / "batches.meta", pickled({b"num_cases_per_batch": 10, b"label_names": names}))


def batch10(images, labels):
    names = [b"photo.png"] * len(labels)
    return pickled({b"data": rows(images), b"labels": labels.tolist(), b"filenames": names})


def write_binary10(folder, train, test):
    for number in range(5):
        images, labels = (part[number::5] for part in train)
        write(folder / f"data_batch_{number + 1}.bin", np.c_[labels, rows(images)].astype("u1"))
    write(folder / "test_batch.bin", np.c_[test[1], rows(test[0])].astype("u1"))
    write(folder / "batches.meta.txt", ("\n".join(NAMES10) + "\n\n").encode())


def write_python100(folder, train, test):
    for name, (images, labels) in (("train", train), ("test", test)):
        both = {b"fine_labels": labels.tolist(), b"coarse_labels": (labels // 5).tolist()}
        write(folder / name, pickled({b"data": rows(images), **both}))
    write(folder / "meta", pickled({b"fine_label_names": [name.encode() for name in NAMES100]}))


def write_binary100(folder, train, test):
    for name, (images, labels) in (("train", train), ("test", test)):
        write(folder / f"{name}.bin", np.c_[labels // 5, labels, rows(images)].astype("u1"))
    write(folder / "fine_label_names.txt", "\n".join(NAMES100).encode())


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(content))


PUBLISHED = {
    "cifar10": {"cifar-10-batches-py": write_python10, "cifar-10-batches-bin": write_binary10},
    "cifar100": {"cifar-100-python": write_python100, "cifar-100-binary": write_binary100},
}
ARCHIVES = {
    "cifar-10-batches-py": "cifar-10-python.tar.gz",
    "cifar-10-batches-bin": "cifar-10-binary.tar.gz",
    "cifar-100-python": "cifar-100-python.tar.gz",
    "cifar-100-binary": "cifar-100-binary.tar.gz",
}
FORMS = [(dataset, folder) for dataset, folders in PUBLISHED.items() for folder in folders]


def photos(classes):
    """Random images and labels, for training and for testing."""
    parts = []
    for seed, count in enumerate((50, 20)):
        images = np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)
        parts.append((images, np.arange(count) * 7 % classes))
    return parts


def check(shards, train, test):
    for name, (images, labels) in (("train", train), ("test", test)):
        split = shards.split(name)
        assert len(split) == len(labels)
        for index in range(len(split)):
            found = np.flatnonzero((images == decode(split.read(index))).all((1, 2, 3)))
            assert split.label[index] in labels[found]


@pytest.mark.parametrize("kind", ["folder", "above", "archive", "archive in a folder"])
@pytest.mark.parametrize(("dataset", "folder"), FORMS)
def test_both_forms_of_both(tmp_path, dataset, folder, kind):
    names = NAMES10 if dataset == "cifar10" else NAMES100
    train, test = photos(len(names))
    PUBLISHED[dataset][folder](tmp_path / "in" / folder, train, test)
    source = tmp_path / "in" / folder if kind == "folder" else tmp_path / "in"
    if kind.startswith("archive"):
        (tmp_path / "packed").mkdir()
        source = tmp_path / "packed" / ARCHIVES[folder]
        with tarfile.open(source, "w:gz") as archive:
            archive.add(tmp_path / "in" / folder, folder)
        source = source if kind == "archive" else source.parent
    shards = make(dataset, tmp_path / "set", source, shard_mb=0.05)
    assert shards.class_names == names and verify(shards.folder) == []
    check(shards, train, test)
    before = files_of(tmp_path / "set")
    (tmp_path / "set/manifest.json").unlink()
    next((tmp_path / "set/train").glob("*.tar")).unlink()
    make(dataset, tmp_path / "set", source, shard_mb=0.05)
    assert files_of(tmp_path / "set") == before


def test_real_photos(tmp_path, real_data):
    """The same photos by either form, and as they were."""
    found = {"train": ([], []), "test": ([], [])}
    with tarfile.open(real_data / "cifar10-sample.tar.gz") as archive:
        for member in archive:
            _, split, label, name = member.name.split("/")
            if int(name.split(".")[0]) < 5:
                image = Image.open(io.BytesIO(archive.extractfile(member).read()))
                found[split][0].append(np.asarray(image.convert("RGB")))
                found[split][1].append(NAMES10.index(label))
    train, test = ((np.stack(images), np.array(labels)) for images, labels in found.values())
    for folder, writer in PUBLISHED["cifar10"].items():
        writer(tmp_path / folder, train, test)
        check(make("cifar10", tmp_path / f"set-{folder}", tmp_path / folder), train, test)


def test_the_pickles_of_these_tests_are_numpys():
    (images, labels), _ = photos(10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the place where NumPy had its functions
        content = pickle.loads(batch10(images, labels), encoding="bytes")
    assert np.array_equal(content[b"data"], rows(images))
    assert content[b"labels"] == labels.tolist()


def replaced(name, content):
    def change(folder):
        (folder / name).write_bytes(content)

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-1])


FEW = {b"data": np.zeros((2, 3072), "u1"), b"labels": [1, 2]}
WRONG = {
    "a call": (replaced("test_batch", b"\x80\x02cos\nsystem\n(T\x02\0\0\0:;tR."), r"os\.system"),
    "cut": (cut("data_batch_3"), r"data_batch_3: not a readable pickle"),
    "text": (replaced("test_batch", b"<html>"), "test_batch: not a readable pickle"),
    "no dictionary": (replaced("test_batch", pickled([1])), "test_batch: .* no dictionary"),
    "nothing": (replaced("test_batch", pickled({})), r"test_batch: must hold 'data'"),
    "labels": (replaced("test_batch", pickled({**FEW, b"labels": [1]})), r"N 'labels'"),
    "numbers": (replaced("test_batch", pickled({**FEW, b"labels": [1, b"x"]})), r"N 'labels'"),
    "class 10": (replaced("test_batch", pickled({**FEW, b"labels": [1, 10]})), "from 0 to 9"),
    "class -1": (replaced("test_batch", pickled({**FEW, b"labels": [1, -1]})), "from 0 to 9"),
    "shape": (
        replaced("test_batch", pickled({**FEW, b"data": np.zeros((2, 9), "u1")})),
        r"\[N, 3072\]",
    ),
    "no names": (replaced("batches.meta", pickled({})), r"batches\.meta: holds no names"),
    "missing": (lambda folder: (folder / "data_batch_2").unlink(), r"has no .*data_batch_2: "),
}


@pytest.mark.parametrize("change", WRONG)
def test_pickles_that_are_damaged_or_worse(tmp_path, change):
    write_python10(tmp_path / "in", *photos(10))
    damage, words = WRONG[change]
    damage(tmp_path / "in")
    with pytest.raises(InputError, match=words):
        make("cifar10", tmp_path / "set", tmp_path / "in")


def test_other_sources_that_are_none(tmp_path):
    write_binary10(tmp_path / "in", *photos(10))
    cut("test_batch.bin")(tmp_path / "in")
    with pytest.raises(InputError, match=r"test_batch\.bin: .* no multiple of 3073"):
        make("cifar10", tmp_path / "set", tmp_path / "in")
    with pytest.raises(InputError, match=r"has no train: .*cifar-100-binary\.tar\.gz"):
        make("cifar100", tmp_path / "set", tmp_path / "in")
    write_binary10(tmp_path / "two/a", *photos(10))
    write_python10(tmp_path / "two/b", *photos(10))
    with pytest.raises(InputError, match=r"a/test_batch\.bin.*b/test_batch|b/.*a/"):
        make("cifar10", tmp_path / "set", tmp_path / "two")
