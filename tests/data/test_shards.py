"""Writing and opening shards: reproducible bytes, exact offsets, refusals of broken sets."""

import json
import pickle
import subprocess
import sys
import tarfile

import pytest
import webdataset

from r2id.data.index import find_intact, read_commit
from r2id.data.manifest import MANIFEST, PLAN
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from tests.data.conftest import MIXED, make_image, make_records, write_set


def test_reads_are_the_original_bytes(mixed):
    split = mixed.split("train")
    records = make_records(MIXED)
    assert len(split) == len(records) and mixed.num_classes == 3
    for index in (0, 19, 20, 137):
        assert split.read(index) == records[index].image
        assert split.key(index) == records[index].key
        assert (split.height[index], split.width[index]) == (
            records[index].height,
            records[index].width,
        )
        assert split.label[index] == records[index].label
    assert split.indices_in_shard(6).tolist() == list(range(120, 138))


def test_any_webdataset_reader_streams_the_tars(mixed):
    urls = [str(path) for path in mixed.split("train").files]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    expected = make_records(MIXED)
    assert [sample["__key__"] for sample in samples] == [record.key for record in expected]
    for sample, record in zip(samples, expected, strict=True):
        assert sample["png"] == record.image and sample["cls"] == b"%d" % record.label
        facts = json.loads(sample["json"])
        assert facts == {
            "height": record.height,
            "width": record.width,
            "mode": "L",
            "number": record.meta["number"],
        }


def test_the_same_records_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_shard_files(tmp_path / name, "train/shard-000000.tar", make_records(MIXED[:9]), [])
    for file in ("shard-000000.tar", "shard-000000.parquet"):
        assert (tmp_path / "a/train" / file).read_bytes() == (
            tmp_path / "b/train" / file
        ).read_bytes()
    with tarfile.open(tmp_path / "a/train/shard-000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid, bool(m.pax_headers)) for m in tar} == {
            (0, "", "", 0, False)
        }


def test_samples_without_class_have_no_cls(tmp_path):
    shards = write_set(tmp_path, {"train": [(4, 4)] * 3}, classes=0)
    assert shards.num_classes == 0 and shards.split("train").label.tolist() == [-1] * 3
    assert all(
        "cls" not in sample
        for sample in webdataset.WebDataset(
            str(tmp_path / "train/shard-000000.tar"), shardshuffle=False
        )
    )


def test_jpeg_and_webp_are_kept_as_they_are(tmp_path):
    records = [
        Record(f"k{ext}", make_image(1, 9, 7, "RGB", ext), ext, 9, 7, "RGB")
        for ext in ("jpg", "webp")
    ]
    write_shard_files(tmp_path, "train/shard-000000.tar", records, [])
    (tmp_path / "train/shard-000000.tar").rename(tmp_path / "x.tar")
    found = {
        ext: sample[ext]
        for sample in webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
        for ext in ("jpg", "webp")
        if ext in sample
    }
    assert found == {record.ext: record.image for record in records}


@pytest.mark.parametrize("key", ["img.v2", "", "a/b", "ü", "new\nline", "x" * 91])
def test_keys_that_webdataset_would_confuse_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="must be"):
        write_shard_files(tmp_path, "train/s.tar", [Record(key, b"", "png", 1, 1, "L")], [])
    assert list((tmp_path / "train").iterdir()) == []


def test_a_key_that_comes_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        write_shard_files(tmp_path, "train/s.tar", make_records([(2, 2)]) * 2, [])


def test_an_error_halfway_leaves_nothing(tmp_path):
    def failing():
        yield from make_records([(2, 2)] * 3)
        raise OSError(28, "No space left on device")

    with pytest.raises(WorkError, match=r"s\.tar: .*No space left"):
        write_shard_files(tmp_path, "train/s.tar", failing(), [])
    assert list((tmp_path / "train").iterdir()) == []
    assert find_intact(tmp_path, "train/s.tar") is None


def test_a_shard_counts_only_when_committed_and_intact(tmp_path):
    entry = write_shard_files(tmp_path, "train/s.tar", make_records([(2, 2)] * 3), [])
    assert find_intact(tmp_path, "train/s.tar") == entry == read_commit(tmp_path, "train/s.tar")[0]
    tar = bytearray((tmp_path / "train/s.tar").read_bytes())
    tar[700] ^= 1
    (tmp_path / "train/s.tar").write_bytes(tar)
    assert find_intact(tmp_path, "train/s.tar") is None


def test_a_split_goes_to_other_processes(mixed):
    split = mixed.split("train")
    split.read(3)
    assert pickle.loads(pickle.dumps(split)).read(3) == split.read(3)


def test_digest_follows_the_content(tmp_path):
    first = write_set(tmp_path / "a", {"train": [(4, 4)] * 3})
    assert first.digest == write_set(tmp_path / "b", {"train": [(4, 4)] * 3}).digest
    assert first.digest != write_set(tmp_path / "c", {"train": [(4, 4)] * 4}).digest


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BREAKAGES = {
    "no manifest": (lambda d: (d / MANIFEST).unlink(), "not a shard set"),
    "unfinished": (lambda d: (d / MANIFEST).rename(d / PLAN), "unfinished"),
    "no JSON": (lambda d: (d / MANIFEST).write_text("{"), "damaged or edited"),
    "a list": (lambda d: (d / MANIFEST).write_text("[]"), "format version None"),
    "other version": (lambda d: edit(d / MANIFEST, format_version=9), "format version 9"),
    "unknown field": (lambda d: edit(d / MANIFEST, colour="red"), "damaged or edited"),
    "edited": (lambda d: edit(d / MANIFEST, class_names=["cat"]), "edited"),
    "missing shard": (lambda d: (d / "train/shard-000001.tar").unlink(), "missing"),
    "missing index": (lambda d: (d / "train/shard-000001.parquet").unlink(), "missing"),
    "short shard": (
        lambda d: (d / "train/shard-000001.tar").write_bytes(b"x"),
        "1 bytes instead of",
    ),
}


@pytest.mark.parametrize(("breakage", "words"), BREAKAGES.values(), ids=BREAKAGES.keys())
def test_what_is_no_intact_set_is_refused_in_one_line(own_mixed, breakage, words):
    breakage(own_mixed.folder)
    with pytest.raises(InputError, match=words) as caught:
        ShardSet.open(own_mixed.folder)
    assert str(own_mixed.folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_is_missing_or_a_split_that_is(mixed, tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        ShardSet.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"'val'.* train, test"):
        mixed.split("val")


def test_a_shard_that_shrinks_or_goes_while_it_is_read(own_mixed):
    split = own_mixed.split("train")
    with split.files[0].open("r+b") as file:
        file.truncate(100)
    with pytest.raises(WorkError, match="image-0000"):
        split.read(0)
    split.files[1].unlink()
    with pytest.raises(WorkError, match="cannot be read"):
        split.read(20)


def test_an_empty_shard_is_a_shard(tmp_path):
    entry = write_shard_files(tmp_path, "train/s.tar", [], [])
    assert entry.samples == 0 and find_intact(tmp_path, "train/s.tar") == entry
    with tarfile.open(tmp_path / "train/s.tar") as tar:
        assert tar.getnames() == []


def test_reading_an_index_leaves_no_threads_behind(digits):
    # A thread of Arrow's that frees a buffer while Python exits aborts the process.
    program = (
        "import os, sys; from pathlib import Path; from r2id.data.shards import ShardSet\n"
        "before = os.listdir('/proc/self/task')\n"
        "shards = ShardSet.open(Path(sys.argv[1])); shards.split('train')\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(digits)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
