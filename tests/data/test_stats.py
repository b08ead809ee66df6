"""Statistics of a shard set, checked by hand."""

import numpy as np
import pytest

from r2id.config import DataConfig
from r2id.data.loader import split_buckets
from r2id.data.stats import crop_loss, describe_stats, split_stats
from tests.data.conftest import write_set


def test_figures_of_a_split(mixed):
    stats = split_stats(mixed, DataConfig(shards=mixed.folder), "train", batch=12)
    assert stats["samples"] == 138 and stats["shards"] == 7
    assert stats["height"] == {"min": 1, "median": 8, "max": 30}
    assert stats["ratio"] == {
        "min": pytest.approx(2 / 3),
        "median": 1,
        "max": pytest.approx(40 / 9),
    }
    assert stats["classes"]["count"] == 3 and stats["classes"]["samples"] == {
        "min": 46,
        "median": 46,
        "max": 46,
    }
    assert [(row["height"], row["width"], row["samples"]) for row in stats["buckets"][:2]] == [
        (8, 8, 70),
        (8, 12, 65),
    ]
    assert stats["steps"] == 6 + 6 + 3 and stats["repeats"] == 15 * 12 - 138
    assert sum(row["repeats"] for row in stats["buckets"]) == stats["repeats"]
    assert stats["lost"] == 0


def test_classes_and_bytes(tmp_path):
    shards = write_set(tmp_path, {"train": [(8, 8)] * 5})  # labels 0, 1, 2, 0, 1
    stats = split_stats(shards, DataConfig(shards=tmp_path), "train", batch=1)
    assert stats["classes"] == {
        "count": 3,
        "unlabelled": 0,
        "samples": {"min": 1, "median": 2, "max": 2},
        "rarest": "class 2",
        "largest": "class 0",
    }
    samples = shards.split("train")
    assert stats["bytes"] == sum(len(samples.read(number)) for number in range(5))


def test_sizes_that_are_rare(tmp_path):
    """A whole step may be copies of one picture: that is said, and of which size."""
    shards = write_set(tmp_path, {"train": [(8, 8)] * 70 + [(1, 1), (30, 1)] + [(30, 30)] * 3})
    stats = split_stats(shards, DataConfig(shards=tmp_path), "train", batch=8)
    rows = {(row["height"], row["width"]): row for row in stats["buckets"]}
    assert [rows[size]["times"] for size in ((8, 8), (1, 1), (30, 1), (30, 30))] == [2, 8, 8, 3]
    told = "\n".join(describe_stats("train", stats))
    assert (
        "12 steps in 4 buckets, 21 images again to fill the last steps, one up to 8 times" in told
    )
    assert (
        "less than half a step: 30x30 (3 images up to 3 times), 1x1 (1 image up to 8 times), "
        "30x1 (1 image up to 8 times)\n"
    ) in told
    few = split_stats(shards, DataConfig(shards=tmp_path), "train", batch=1)
    told = "\n".join(describe_stats("train", few))
    assert "75 steps in 4 buckets, 0 images again to fill the last steps; " in told
    assert "less than half" not in told


def test_what_a_shape_cuts_off(tmp_path):
    shards = write_set(tmp_path, {"train": [(20, 40), (40, 20), (8, 8)]})
    samples = shards.split("train")
    square = split_buckets(samples, DataConfig(shards=tmp_path, size=(10, 10)))
    assert np.allclose(crop_loss(samples, square), [0.5, 0.5, 0])
    wide = split_buckets(samples, DataConfig(shards=tmp_path, size=(10, 20)))
    assert np.allclose(crop_loss(samples, wide), [0, 0.75, 0.5])
