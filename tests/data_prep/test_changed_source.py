"""A source that changes between the runs of a preparation, by files of the same names and lengths.

Names and lengths are all that the digest of a source of files covers.
"""

import json
import os
import shutil

import numpy as np
import pytest

from data_prep.prepare import make_shard_plan, prepare, write_shard
from data_prep.readers import cached_reader
from data_prep.repair import repair
from r2id.config import PrepareConfig
from r2id.data.shards import ShardSet
from r2id.data.verify import verify
from r2id.errors import InputError, WorkError
from tests.data_prep.archives import IMAGES, write_tar, write_zip
from tests.data_prep.conftest import files_of, make, write_images, write_mnist

FIRST = "train/shard-000000.tar"
NEWER = "has files newer than the set"


def write_embeddings(source, value):
    for path in sorted(source.glob("*.png")):
        np.save(path.with_suffix(".npy"), np.full(4, value, np.float32))


def embeddings_in(out):
    splits = map(ShardSet.open(out, embeddings=True).split, ("train", "test"))
    return {value for split in splits for value in split.embedding[:, 0].tolist()}


@pytest.fixture
def config(tmp_path):
    """Images with embeddings of ones."""
    write_images(tmp_path / "in", [f"{number}.png" for number in range(60)])
    write_embeddings(tmp_path / "in", 1)
    return PrepareConfig(
        dataset="folder", source=tmp_path / "in", out=tmp_path / "set", shard_mb=0.05
    )


def begin(config):
    """Write one shard of several, as a preparation that is killed does."""
    plan = make_shard_plan(config)
    assert len(plan.files) > 3
    write_shard(plan, 0)
    return plan


def change_plan(out, **changes):
    path = out / "plan.json"
    plan = json.loads(path.read_bytes()) | changes
    path.write_text(json.dumps({name: plan[name] for name in plan if plan[name] is not None}))


def test_an_unfinished_set_takes_no_changed_embeddings(config, tmp_path):
    begin(config)
    before = files_of(config.out)
    write_embeddings(tmp_path / "in", 2)
    with pytest.raises(WorkError) as caught:
        prepare(config)
    assert str(caught.value) == (
        f"{tmp_path / 'in'}: changed since the preparation began, or copied since without its "
        f"times: delete {config.out}, or give another --out"
    )
    assert files_of(config.out) == before
    shutil.rmtree(config.out)
    prepare(config)
    assert embeddings_in(config.out) == {2}


def test_a_plan_of_before_goes_on_as_it_did(config, tmp_path):
    begin(config)
    change_plan(config.out, newest=None)
    write_embeddings(tmp_path / "in", 2)
    prepare(config)
    assert embeddings_in(config.out) == {1, 2}


def test_a_finished_set_is_kept_and_says_that_it_is_older(config, tmp_path, capfd):
    prepare(config)
    before = files_of(config.out)
    prepare(config)
    assert NEWER not in capfd.readouterr().err
    write_embeddings(tmp_path / "in", 2)
    prepare(config)
    said = [line for line in capfd.readouterr().err.splitlines() if NEWER in line]
    assert said == [
        f"{tmp_path / 'in'}: has files newer than the set {config.out}, which is kept: to make it "
        "anew, delete it or give another --out"
    ]
    assert files_of(config.out) == before


def test_a_later_copy_of_the_source_repairs_a_finished_set(config, tmp_path):
    prepare(config)
    before = files_of(config.out)
    for path in (tmp_path / "in").iterdir():
        os.utime(path)
    (config.out / FIRST).unlink()
    repair(config.out, verify(config.out))
    assert files_of(config.out) == before


@pytest.mark.parametrize("newest", [None, 1])
def test_a_damaged_shard_of_a_finished_set_is_not_made_of_changed_embeddings(
    config, tmp_path, newest
):
    """Whether the plan holds a time or, as one of before, none: as by verify --repair."""
    prepare(config)
    change_plan(config.out, newest=newest)
    before = files_of(config.out)
    shard = config.out / FIRST
    write_embeddings(tmp_path / "in", 2)
    for workers in (1, 2):
        shard.write_bytes(b"cut")
        with pytest.raises(WorkError, match=rf"^{shard}: cannot be rebuilt: source .* no longer"):
            prepare(config.model_copy(update={"workers": workers}))
        assert not shard.exists() and not shard.with_suffix(".parquet").exists()
        assert (config.out / "manifest.json").read_bytes() == before["manifest.json"]
    write_embeddings(tmp_path / "in", 1)
    prepare(config)
    assert files_of(config.out) == before


def test_a_damaged_manifest_of_a_source_that_is_newer(config, tmp_path):
    """It is written again; a shard is not, as its hash is unknown."""
    prepare(config)
    before = files_of(config.out)
    write_embeddings(tmp_path / "in", 2)
    manifest = config.out / "manifest.json"
    for damaged in (b"{", manifest.read_bytes().replace(b'"folder"', b'"holder"')):
        manifest.write_bytes(damaged)
        repair(config.out, verify(config.out))
        assert files_of(config.out) == before
        manifest.write_bytes(damaged)
        (config.out / FIRST).write_bytes(b"cut")
        with pytest.raises(WorkError, match=r"\.npy: changed since the preparation began"):
            repair(config.out, verify(config.out))
        (config.out / FIRST).with_suffix(".parquet").write_bytes(
            before[FIRST.replace(".tar", ".parquet")]
        )
        (config.out / FIRST).write_bytes(before[FIRST])


def test_a_decompressed_copy_is_as_old_as_its_archive(tmp_path, capfd, monkeypatch):
    """It is made again whenever the source is listed, and that is no change."""
    monkeypatch.setattr("data_prep.tars._CHUNK", 4096)  # less than a file buffers
    write_tar(tmp_path / "pets.tgz", IMAGES, "w:gz")
    os.utime(tmp_path / "pets.tgz", (10, 10))
    config = PrepareConfig(
        dataset="folder", source=tmp_path / "pets.tgz", out=tmp_path / "set", shard_mb=0.05
    )
    make_shard_plan(config)
    shutil.rmtree(config.out / "source")
    prepare(config)
    before = files_of(config.out)
    (config.out / FIRST).unlink()
    repair(config.out, verify(config.out))
    prepare(config)
    assert files_of(config.out) == before and NEWER not in capfd.readouterr().err
    (config.out / "manifest.json").unlink()
    os.utime(tmp_path / "pets.tgz")
    with pytest.raises(WorkError, match="changed since the preparation began"):
        prepare(config)


def test_a_zip_that_is_cut_and_keeps_its_time(tmp_path):
    """The whole source is at fault, so none of its images becomes a reject."""
    path = tmp_path / "pets.zip"
    write_zip(path, IMAGES)
    plan = make_shard_plan(PrepareConfig(dataset="folder", source=path, out=tmp_path / "set"))
    before = path.stat()
    path.write_bytes(path.read_bytes()[: before.st_size // 2])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    cached_reader.cache_clear()  # as in a new process
    with pytest.raises(InputError, match=r"pets\.zip: truncated or damaged"):
        write_shard(plan, 0)
    assert not list((tmp_path / "set").rglob("*.tar"))


def test_arrays_are_compared_by_their_content(tmp_path, capfd):
    """Their digest covers it, so that a later copy is no other source."""
    write_mnist(tmp_path / "in", train=200)
    config = PrepareConfig(
        dataset="mnist", source=tmp_path / "in", out=tmp_path / "set", shard_mb=0.1
    )
    begin(config)
    for path in (tmp_path / "in").iterdir():
        os.utime(path)
    prepare(config)
    prepare(config)
    assert NEWER not in capfd.readouterr().err
    make("mnist", tmp_path / "other", tmp_path / "in", shard_mb=0.1)
    assert files_of(config.out) == files_of(tmp_path / "other")
