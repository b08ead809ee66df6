"""Statistics of a shard set, checked by hand."""

import numpy as np
import pytest

from r2id.config import DataConfig
from r2id.data.loader import split_buckets
from r2id.data.stats import crop_loss, split_stats
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


def test_what_a_shape_cuts_off(tmp_path):
    shards = write_set(tmp_path, {"train": [(20, 40), (40, 20), (8, 8)]})
    samples = shards.split("train")
    square = split_buckets(samples, DataConfig(shards=tmp_path, size=(10, 10)))
    assert np.allclose(crop_loss(samples, square), [0.5, 0.5, 0])
    wide = split_buckets(samples, DataConfig(shards=tmp_path, size=(10, 20)))
    assert np.allclose(crop_loss(samples, wide), [0, 0.75, 0.5])
