"""Where a source has no splits of its own, a tenth of all is set aside for testing."""

import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from data_prep.items import TEST_SHARE, stratified_test
from pipelines.pipeline import PipelineExecution
from r2id.config import PipelineRun, load_config
from r2id.errors import InputError
from tests.data_prep.conftest import make, write_images


@pytest.mark.parametrize(
    ("sizes", "tested"),
    [
        ([4] * 10, 4),  # no class is large enough for one of its own
        ([20, 20], 4),
        ([14] * 5, 7),  # 1.4 of each
        ([16] * 5, 8),
        ([1] * 20, 2),
        ([1] * 10 + [2] * 5, 2),
        ([5], 0),
        ([6], 1),
        ([100, 10, 1], 11),
    ],
)
def test_a_tenth_of_all_and_of_each_class(sizes, tested):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    chosen = stratified_test(labels.tolist(), TEST_SHARE)
    counts = np.bincount(labels[chosen], minlength=len(sizes))
    assert counts.sum() == tested == round(TEST_SHARE * sum(sizes))
    assert np.abs(counts - TEST_SHARE * np.array(sizes)).max() < 1
    if max(sizes) > 1:
        assert (counts < sizes).all(), "a class is left without training images"
    assert np.array_equal(chosen, stratified_test(labels.tolist(), TEST_SHARE))


def test_many_classes_are_divided_in_one_pass():
    """Each with the draws of its own that a pass for each class gives, which takes minutes here."""
    labels = np.random.default_rng(0).integers(0, 150_000, 200_000)
    labels[:5] = -1
    began = time.process_time()
    chosen = stratified_test([None if label < 0 else label for label in labels], TEST_SHARE)
    assert time.process_time() - began < 5
    classes, sizes = np.unique(labels, return_counts=True)
    generator = np.random.Generator(np.random.PCG64(0))
    drawn = np.split(generator.random(len(labels)), np.cumsum(sizes))
    for number, label in enumerate(classes[:300]):
        members = np.flatnonzero(labels == label)
        count = int(chosen[members].sum())
        expected = members[np.argsort(drawn[number], kind="stable")[:count]]
        assert np.array_equal(np.sort(expected), members[chosen[members]])
    assert len(stratified_test([], TEST_SHARE)) == 0


def test_ten_classes_of_four_images_have_a_test_split(tmp_path):
    write_images(tmp_path / "in", [f"{label}/{n}.png" for label in range(10) for n in range(4)])
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert shards.summary()["samples"] == {"train": 36, "test": 4}
    assert set(shards.split("train").label) == set(range(10))


@pytest.mark.parametrize(
    ("names", "sample", "said"),
    [
        (
            [f"{number}.png" for number in range(3)],
            "",
            r"riae: data\.test_split: .* no split 'test': .* train",
        ),
        (
            [f"{label}/{number}.png" for label in range(2) for number in range(9)],
            "labels = [1, 2]",
            r"sample\.labels: label 2: must be 0 to 1",
        ),
        (
            [f"{number}.png" for number in range(9)],
            "labels = [0]",
            r"sample\.labels: label 0: must be none: the model has no classes",
        ),
    ],
)
def test_a_pipeline_says_what_the_shards_lack_before_it_trains(tmp_path, names, sample, said):
    pipeline = write_pipeline(tmp_path, names, f"[sample]\n{sample}")
    with pytest.raises(InputError, match=said):
        pipeline.check_data()


def test_a_pipeline_needs_the_split_that_it_evaluates_on(tmp_path):
    names = [f"{split}/{number}.png" for split in ("train", "val") for number in range(4)]
    for split, said in (("train", ""), ("valid", r"^evaluate\.split: .* no split 'valid'")):
        pipeline = write_pipeline(tmp_path / split, names, f"[evaluate]\nsplit = '{split}'")
        with pytest.raises(InputError, match=said) if said else nullcontext():
            pipeline.check_data()


def write_pipeline(tmp_path: Path, names: list[str], sections: str) -> PipelineExecution:
    """A pipeline, not yet run, and its shards of images of these names."""
    write_images(tmp_path / "in", names)
    make("folder", tmp_path / "set", tmp_path / "in")
    (tmp_path / "riae.toml").write_text(
        'stage = "riae"\nrun = "x"\n[data]\nshards = "x"\n[train]\nsteps = 4\n'
    )
    (tmp_path / "r2id.toml").write_text(
        'stage = "r2id"\nrun = "x"\ncodec = "x"\n[data]\nshards = "x"\n[train]\nsteps = 4\n'
    )
    (tmp_path / "pipeline.toml").write_text(
        f"""stage = "pipeline"
name = "few"
out = "{tmp_path / "out"}"
[prepare]
dataset = "folder"
source = "{tmp_path / "in"}"
out = "{tmp_path / "set"}"
[riae]
config = "riae.toml"
[r2id]
config = "r2id.toml"
{sections}
"""
    )
    config = load_config(tmp_path / "pipeline.toml")
    assert isinstance(config, PipelineRun)
    return PipelineExecution(config, tmp_path)
