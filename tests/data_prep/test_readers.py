"""The table of datasets: a line in it is all that the rest of r2id needs to know of a reader."""

from pathlib import Path

import numpy as np
import pytest

from data_prep.arrays import ArrayReader
from data_prep.prepare import prepare
from data_prep.readers import DATASETS, Dataset, check_options, open_reader
from r2id.config import PrepareConfig
from r2id.data.records import decode
from r2id.data.shards import ShardSet
from r2id.errors import InputError


def open_dots(source: Path | None, _downloads: Path, _max_pixels: int) -> ArrayReader:
    assert source is not None
    images = np.eye(9, dtype=np.uint8).reshape(9, 3, 3) * 255
    return ArrayReader({"train": (images, np.arange(9))}, [str(place) for place in range(9)])


def test_a_reader_and_a_line_are_a_new_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "dots", Dataset(f"{__name__}:open_dots", "nine dots"))
    config = PrepareConfig(dataset="dots", source=tmp_path, out=tmp_path / "set")
    shards = ShardSet.open(prepare(config))
    assert shards.manifest.dataset == "dots"
    assert shards.summary()["samples"] == {"train": 9}


@pytest.mark.parametrize("shape", [(4, 40, 50), (4, 40, 50, 3)])
def test_arrays_are_stored_without_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    reader = ArrayReader({"train": (images, np.arange(4) % 2)}, ["even", "odd"])
    monkeypatch.setitem(DATASETS, "noise", Dataset(f"{__name__}:open_noise", "noise"))
    monkeypatch.setitem(globals(), "open_noise", lambda *_: reader)
    split = ShardSet.open(prepare(PrepareConfig(dataset="noise", out=tmp_path / "set"))).split(
        "train"
    )
    for index in range(4):
        number = int(split.key(index).split("-")[1])
        record = decode(split.read(index))
        assert np.array_equal(record.reshape(shape[1:]), images[number])


def test_lines_name_fields_of_the_config() -> None:
    for dataset in DATASETS.values():
        assert set(dataset.options) <= PrepareConfig.model_fields.keys()


def test_an_unknown_dataset_is_an_input_error(tmp_path: Path) -> None:
    config = PrepareConfig(dataset="mnits", out=tmp_path / "set")
    for use in (check_options, open_reader, prepare):
        with pytest.raises(InputError, match=r"'mnits'.*'mnist'"):
            use(config)
    assert not config.out.exists()
