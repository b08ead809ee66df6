"""Small shard sets of random images, of one size or of many."""

import io
import shutil

import numpy as np
import pytest
from PIL import Image

from r2id.data.manifest import FORMAT_VERSION, Manifest, SplitEntry, shard_file
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.data.shards import ShardSet
from r2id.data.verify import verify


def make_image(number, height, width, mode="L", ext="png"):
    """Bytes of an image whose pixels depend on its number."""
    depth = {"L": (), "RGB": (3,)}[mode]
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, *depth), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[ext])
    return buffer.getvalue()


def make_records(sizes, classes=3):
    return [
        Record(
            f"image-{number:04d}",
            make_image(number, *size),
            "png",
            *size,
            "L",
            number % classes if classes else None,
            {"number": number},
        )
        for number, size in enumerate(sizes)
    ]


def write_set(folder, splits, per_shard=20, classes=3):
    """``splits``: name → sizes of its images."""
    entries = {}
    for name, sizes in splits.items():
        records = make_records(sizes, classes)
        shards = [
            write_shard_files(folder, shard_file(name, i), records[start : start + per_shard], [])
            for i, start in enumerate(range(0, len(records), per_shard))
        ]
        entries[name] = SplitEntry(
            samples=len(records), bytes=sum(entry.bytes for entry in shards), shards=shards
        )
    Manifest(
        format_version=FORMAT_VERSION,
        dataset="random",
        source_digest="0" * 64,
        rejects=0,
        splits=entries,
        class_names=[f"class {number}" for number in range(classes)],
    ).write(folder)
    return ShardSet.open(folder)


MIXED = [(8, 8)] * 70 + [(8, 12)] * 65 + [(30, 20), (1, 1), (9, 40)]


@pytest.fixture(scope="session")
def mixed(build_once):
    """138 images of five sizes for training and 11 for testing, which no test may change."""

    def build(folder):
        write_set(folder / "set", {"train": MIXED, "test": [(8, 8)] * 7 + [(8, 20)] * 4})

    folder = build_once("mixed", build) / "set"
    yield ShardSet.open(folder)
    assert not verify(folder), "a test has changed what the others read"


@pytest.fixture
def own_mixed(mixed, tmp_path):
    """A copy of that set, for a test that damages it."""
    return ShardSet.open(shutil.copytree(mixed.folder, tmp_path / "mixed"))
