"""List the datasets by name, and open them.

To add a dataset, write its reader in a file of its own and add a line to DATASETS. A reader is a
data_prep.items.Reader, and there are two to start from:

* of arrays of pixels: a function that loads them into a data_prep.arrays.ArrayReader, as
  data_prep.digits does;
* of image files: a subclass of data_prep.file_records.FileRecords that adds the listing, as
  data_prep.folder does.

Dataset.opener says what it is called with. ``r2id prepare NAME`` and ``prepare.dataset`` of a
pipeline then take the name. An option that no dataset has had yet is also a field of PrepareConfig,
in r2id/config/pipeline.py. The tests of a reader are a file in tests/data_prep.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from r2id.config import PrepareConfig
from r2id.errors import InputError

if TYPE_CHECKING:  # the command line lists the datasets without loading what readers need
    from data_prep.items import Reader

DOWNLOADS = "source"
"""Subfolder of a shard set for downloaded or decompressed files."""


@dataclass(frozen=True)
class Dataset:
    """How a dataset is opened."""

    opener: str
    """``module:name`` of the function that makes the Reader, imported when it is called. Its
    arguments are the source, a folder for downloads, the largest number of pixels that an image may
    have, and the ``options``."""
    about: str
    """A few words for the help of ``r2id prepare``."""
    needs: str = ""
    """What its source is, in a few words; empty if it can do without one."""
    options: tuple[str, ...] = ()
    """The fields of PrepareConfig that this dataset takes and not all others do."""


DATASETS = {
    "digits": Dataset("data_prep.digits:open_digits", "shipped, 8x8"),
    "mnist": Dataset("data_prep.mnist:open_mnist", "IDX files"),
    "cifar10": Dataset(
        "data_prep.cifar:open_cifar10",
        "pickles or binary files",
        "the folder or archive of its files",
    ),
    "cifar100": Dataset(
        "data_prep.cifar:open_cifar100", "likewise", "the folder or archive of its files"
    ),
    "celeba": Dataset(
        "data_prep.celeba:CelebaReader",
        "its published or Kaggle's files",
        "the folder of its files",
        ("images", "label", "partial"),
    ),
    "imagenet": Dataset(
        "data_prep.imagenet:open_imagenet",
        "tars, Kaggle, Parquet or folders",
        "the folder of its files",
    ),
    "folder": Dataset(
        "data_prep.folder:FolderReader",
        "any folder, tar or zip of images; NAME.npy beside one is the embedding of its text",
        "the folder or archive of the images",
        ("labels",),
    ),
    "webdataset": Dataset(
        "data_prep.webdataset:WebdatasetReader",
        "existing tars, embeddings likewise",
        "a tar or a folder of tars",
    ),
}


def check_options(config: PrepareConfig) -> None:
    """Raise InputError for an unknown dataset, or an option that the dataset does not take."""
    if config.dataset not in DATASETS:
        raise InputError(
            f"dataset {config.dataset!r}: must be one of {', '.join(map(repr, DATASETS))}"
        )
    for name in sorted({name for dataset in DATASETS.values() for name in dataset.options}):
        value = getattr(config, name)
        takers = [dataset for dataset in DATASETS if name in DATASETS[dataset].options]
        if value != PrepareConfig.model_fields[name].default and config.dataset not in takers:
            raise InputError(
                f"{name} = {value}: dataset {config.dataset!r} takes no such option, "
                f"{', '.join(takers)} does"
            )


def check_source(config: PrepareConfig) -> None:
    """Raise InputError when the source is missing, but for a dataset that can do without one."""
    needs = DATASETS[config.dataset].needs
    if config.source is None and needs:
        raise InputError(f"source: missing: dataset {config.dataset!r} needs {needs}")
    if config.source is not None and not config.source.exists():
        raise InputError(f"source {config.source}: no such file or folder")


def open_reader(config: PrepareConfig) -> Reader:
    """Open a dataset; InputError when its source is missing, or it is not in DATASETS."""
    check_options(config)
    check_source(config)
    dataset = DATASETS[config.dataset]
    module, _, name = dataset.opener.partition(":")
    return getattr(importlib.import_module(module), name)(
        config.source,
        config.out / DOWNLOADS,
        round(config.max_megapixels * 1e6),
        **{option: getattr(config, option) for option in dataset.options},
    )


@lru_cache(maxsize=1)
def cached_reader(config: PrepareConfig, _newest: int) -> Reader:
    """Open a reader, or return the last one if it has the same arguments.

    ``_newest`` is only part of the cache's key: a source that has changed since is opened again.
    """
    return open_reader(config)
