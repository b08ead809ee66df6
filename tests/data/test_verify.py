"""Verification finds each kind of damage and names the file or the sample."""

import json
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from r2id.data.index import read_commit
from r2id.data.manifest import MANIFEST, Manifest, SplitEntry
from r2id.data.shard_writer import write_shard_files
from r2id.data.verify import verify
from r2id.errors import InputError
from tests.data.conftest import make_records

SHARD = "train/shard-000001.tar"


def flip(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 4
    path.write_bytes(data)


def reseal(folder, change):
    """A manifest whose own checksum is right though its content has changed."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    change(manifest).write(folder)


def place_of(shards, index):
    """Of a sample's image in its tar."""
    return int(shards.split("train").offset[index])


def test_an_intact_set_has_no_damage(mixed):
    assert verify(mixed.folder) == []


def test_a_flipped_bit_in_an_image_names_the_sample(own_mixed):
    flip(own_mixed.folder / SHARD, place_of(own_mixed, 25) + 60)
    damages = verify(own_mixed.folder)
    assert {damage.file for damage in damages} == {SHARD}
    assert [damage.key for damage in damages] == [None, "image-0025"]
    assert "sample image-0025: its image has changed" in str(damages[1])


def test_a_flipped_bit_in_a_header(own_mixed):
    flip(own_mixed.folder / SHARD, place_of(own_mixed, 25) - 500)
    assert [str(damage) for damage in verify(own_mixed.folder)] == [
        f"{SHARD}: changed: its hash is not the manifest's"
    ]


@pytest.mark.parametrize("between", [True, False])
def test_truncation(own_mixed, between):
    with (own_mixed.folder / SHARD).open("r+b") as file:
        file.truncate(place_of(own_mixed, 38) - 512 if between else place_of(own_mixed, 38) + 10)
    damages = verify(own_mixed.folder)
    assert "bytes instead of" in damages[0].what
    assert [damage.key for damage in damages[1:]] == ["image-0038", "image-0039"]


def test_missing_and_extra_files(own_mixed):
    (own_mixed.folder / SHARD).rename(own_mixed.folder / "train/shard-000099.tar")
    (own_mixed.folder / "test/shard-000000.parquet").unlink()
    assert {(damage.file, damage.what) for damage in verify(own_mixed.folder)} == {
        (SHARD, "missing"),
        ("train/shard-000099.tar", "not in the manifest"),
        ("test/shard-000000.parquet", "missing"),
    }


def test_a_changed_index(own_mixed):
    path = own_mixed.folder / "train/shard-000001.parquet"
    table = pq.read_table(path)
    pq.write_table(table.set_column(3, "height", table["width"]), path)
    assert [damage.file for damage in verify(own_mixed.folder)] == ["train/shard-000001.parquet"]
    path.write_bytes(b"PAR1")
    assert "unreadable" in verify(own_mixed.folder)[0].what


def test_an_edited_manifest(own_mixed):
    text = json.loads((own_mixed.folder / MANIFEST).read_text())
    (own_mixed.folder / MANIFEST).write_text(json.dumps({**text, "dataset": "other"}))
    assert [damage.file for damage in verify(own_mixed.folder)] == [MANIFEST]
    (own_mixed.folder / MANIFEST).write_text("{")
    assert [damage.file for damage in verify(own_mixed.folder)] == [MANIFEST]


def test_a_manifest_that_was_edited_and_sealed_again(own_mixed):
    def one_sample_less(manifest):
        split = manifest.splits["train"]
        shards = [split.shards[0].model_copy(update={"samples": 19}), *split.shards[1:]]
        return manifest.model_copy(
            update={
                "splits": {
                    **manifest.splits,
                    "train": SplitEntry(
                        samples=split.samples - 1, bytes=split.bytes, shards=shards
                    ),
                }
            }
        )

    reseal(own_mixed.folder, one_sample_less)
    assert [damage.file for damage in verify(own_mixed.folder)] == [MANIFEST]


def test_a_sum_of_samples_that_is_wrong(own_mixed):
    def one_sample_more(manifest):
        split = manifest.splits["train"]
        more = split.model_copy(update={"samples": split.samples + 1})
        return manifest.model_copy(update={"splits": {**manifest.splits, "train": more}})

    reseal(own_mixed.folder, one_sample_more)
    [damage] = verify(own_mixed.folder)
    assert damage.file == MANIFEST and "'train' has 139 samples" in damage.what


def put_in_place(folder, records):
    """Replace the 20 samples of the shard, and seal the set again."""
    write_shard_files(folder, SHARD, records, [])
    entry, _ = read_commit(folder, SHARD)

    def put(manifest):
        split = manifest.splits["train"]
        shards = [split.shards[0], entry, *split.shards[2:]]
        return manifest.model_copy(
            update={
                "splits": {
                    **manifest.splits,
                    "train": SplitEntry(samples=split.samples, bytes=split.bytes, shards=shards),
                }
            }
        )

    reseal(folder, put)


def test_images_that_are_not_what_their_index_says(own_mixed):
    """Their bytes are those that were written."""
    records = make_records([(8, 8)] * 40)[20:]
    records[3] = replace(records[3], height=9)
    records[4] = replace(records[4], width=7)
    records[5] = replace(records[5], image=b"no image")
    put_in_place(own_mixed.folder, records)
    damages = verify(own_mixed.folder)
    assert [(damage.file, damage.key) for damage in damages] == [
        (SHARD, f"image-00{number}") for number in (23, 24, 25)
    ]
    assert damages[0].what == "is 8x8, not 9x8 as the index says"
    assert damages[1].what == "is 8x8, not 8x7 as the index says"


def test_a_key_in_two_shards(own_mixed):
    put_in_place(own_mixed.folder, make_records([(8, 8)] * 20))
    damages = verify(own_mixed.folder)
    assert len(damages) == 20 and damages[0].key == "image-0000" and "twice" in damages[0].what


def test_a_folder_that_is_no_set(tmp_path):
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        verify(tmp_path)
