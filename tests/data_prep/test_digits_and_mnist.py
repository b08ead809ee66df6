"""The digits, and MNIST and its relatives in IDX files, damaged ones included."""

import gzip
import hashlib
import shutil
import tracemalloc

import numpy as np
import pytest
from sklearn.datasets import load_digits

from data_prep import mnist
from data_prep.mnist import read_idx
from r2id.data.records import decode
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.conftest import idx, make, write_mnist


def test_digits(tmp_path):
    shards = make("digits", tmp_path / "set")
    assert shards.summary()["samples"] == {"train": 1438, "test": 359} and shards.num_classes == 10
    assert verify(shards.folder) == []
    pixels, labels = load_digits(return_X_y=True)
    real = sorted(
        (label, np.round(row * 255 / 16).astype(np.uint8).tobytes())
        for row, label in zip(pixels, labels, strict=True)
    )
    stored = [
        (int(split.label[i]), decode(split.read(i)).tobytes())
        for split in map(shards.split, ("train", "test"))
        for i in range(len(split))
    ]
    assert sorted(stored) == real
    shares = np.bincount(shards.split("test").label) / np.bincount(labels)
    assert np.abs(shares - 0.2).max() < 0.01


def test_digits_take_no_source(tmp_path):
    with pytest.raises(InputError, match="source"):
        make("digits", tmp_path / "set", tmp_path)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(("packed", "nested"), [(False, False), (True, True)])
def test_mnist(tmp_path, packed, nested):
    arrays = write_mnist(
        tmp_path / ("source/MNIST/raw" if nested else "source"), packed=packed, height=9, width=7
    )
    shards = make("mnist", tmp_path / "set", tmp_path / "source")
    assert verify(shards.folder) == [] and shards.num_classes == 10
    for split, prefix in (("train", "train"), ("test", "t10k")):
        samples, (images, labels) = shards.split(split), arrays[prefix]
        assert len(samples) == len(images)
        for index in range(len(samples)):
            number = int(samples.key(index).split("-")[1])
            assert np.array_equal(decode(samples.read(index))[:, :, 0], images[number])
            assert samples.label[index] == labels[number]


def test_packed_and_unpacked_files_are_the_same_dataset(tmp_path):
    write_mnist(tmp_path / "a")
    write_mnist(tmp_path / "b", packed=True)
    assert (
        make("mnist", tmp_path / "sa", tmp_path / "a").digest
        == make("mnist", tmp_path / "sb", tmp_path / "b").digest
    )


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def pack(path, length):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes())[:length])
    path.unlink()


DAMAGES = {
    "wrong magic": (
        lambda p: p.write_bytes(b"\x00\x00\x0d\x03" + p.read_bytes()[4:]),
        "00 00 0d 03, not 00 00 08 03",
    ),
    "labels for images": (
        lambda p: p.write_bytes(idx(np.zeros(50, np.uint8))),
        "00 00 08 01, not 00 00 08 03",
    ),
    "empty": (lambda p: p.write_bytes(b""), "begins with nothing"),
    "text": (lambda p: p.write_text("<html>not found"), "not an IDX file"),
    "truncated": (cut, "truncated"),
    "truncated sizes": (lambda p: p.write_bytes(p.read_bytes()[:9]), "truncated"),
    "too long": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "truncated or damaged"),
    "truncated gzip": (lambda p: pack(p, 1000), "truncated or unreadable"),
    "no images": (
        lambda p: p.write_bytes(idx(np.zeros((0, 28, 28), np.uint8))),
        "50 labels for the 0 images",
    ),
    "no pixels": (lambda p: p.write_bytes(idx(np.zeros((50, 0, 28), np.uint8))), "holds no pixels"),
    "missing": (lambda p: p.unlink(), "has no train-images-idx3-ubyte"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_idx_files_are_named(tmp_path, damage, words):
    write_mnist(tmp_path / "source")
    damage(tmp_path / "source/train-images-idx3-ubyte")
    with pytest.raises(InputError, match=words) as caught:
        make("mnist", tmp_path / "set", tmp_path / "source")
    assert "\n" not in str(caught.value) and str(tmp_path / "source") in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("layout", ["FashionMNIST/raw", "KMNIST/raw", "raw", "."])
def test_its_relatives_are_found_where_they_are_kept(tmp_path, layout):
    write_mnist(tmp_path / "files")
    (tmp_path / "source" / layout).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(tmp_path / "files", tmp_path / "source" / layout) if layout != "." else (
        tmp_path / "files"
    ).rename(tmp_path / "source")
    assert make("mnist", tmp_path / "set", tmp_path / "source").summary()["samples"] == {
        "train": 50,
        "test": 20,
    }


def test_names_with_dots_and_of_emnist(tmp_path):
    arrays = write_mnist(tmp_path / "dots")
    for path in (tmp_path / "dots").iterdir():
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    dots = make("mnist", tmp_path / "one", tmp_path / "dots")
    write_mnist(tmp_path / "emnist/raw", packed=True)
    for path in (tmp_path / "emnist/raw").iterdir():
        path.rename(path.with_name("emnist-letters-" + path.name.replace("t10k", "test")))
    letters = make("mnist", tmp_path / "two", tmp_path / "emnist")
    assert dots.digest == letters.digest and len(letters.split("test")) == len(arrays["t10k"][0])
    write_mnist(tmp_path / "emnist/KMNIST/raw")
    with pytest.raises(InputError, match="emnist, KMNIST"):
        make("mnist", tmp_path / "three", tmp_path / "emnist")
    shutil.copy(
        tmp_path / "dots/train-labels.idx1-ubyte",
        tmp_path / "emnist/raw/emnist-digits-train-labels-idx1-ubyte",
    )
    with pytest.raises(InputError, match="holds several datasets"):
        make("mnist", tmp_path / "three", tmp_path / "emnist/raw")


def test_no_more_is_decompressed_than_the_sizes_say(tmp_path):
    path = tmp_path / "images.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(idx(np.zeros((3, 2, 2), np.uint8)))
        for _ in range(200):
            file.write(bytes(1 << 20))
    tracemalloc.start()
    with pytest.raises(InputError, match="28 bytes"):
        read_idx(path, dimensions=3)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_a_source_that_is_missing(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        make("mnist", tmp_path / "set", tmp_path / "nowhere")


def test_without_source_the_files_are_downloaded_and_checked(tmp_path, monkeypatch):
    """An unreachable mirror and one with wrong files are passed over for a mirror on this disk."""
    write_mnist(tmp_path / "good", packed=True)
    shutil.copytree(tmp_path / "good", tmp_path / "bad")
    (tmp_path / "bad/t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"tampered with"))
    sums = {
        path.stem: hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        for path in (tmp_path / "good").iterdir()
    }
    monkeypatch.setattr(mnist, "_CHECKSUMS", sums)
    mirrors = [f"{(tmp_path / name).as_uri()}/" for name in ("away", "bad", "good")]
    monkeypatch.setattr(mnist, "_MIRRORS", mirrors[:2])
    with pytest.raises(WorkError, match=r"t10k-labels-idx1-ubyte\.gz: .*checksum"):
        make("mnist", tmp_path / "set")
    monkeypatch.setattr(mnist, "_MIRRORS", mirrors)
    shards = make("mnist", tmp_path / "set")
    assert shards.digest == make("mnist", tmp_path / "other", tmp_path / "good").digest
    monkeypatch.setattr(mnist, "_MIRRORS", [])
    assert make("mnist", tmp_path / "set").digest == shards.digest  # nothing is fetched again


def test_real_mnist(real_data):
    sums = {}
    for path in sorted((real_data / "mnist").iterdir()):
        sums[path.stem] = hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest()
        array = read_idx(path, dimensions=3 if "images" in path.name else 1)
        assert array.shape[1:] == ((28, 28) if "images" in path.name else ())
        assert len(array) == (60000 if "train" in path.name else 10000)
    assert sums == mnist._CHECKSUMS
