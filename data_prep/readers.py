"""The datasets by name: to add one, write its reader in a file of its own and list it here.

Readers are imported only when they are opened, because some need large libraries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from data_prep.items import Reader
from r2id.config import PrepareConfig
from r2id.errors import InputError

DOWNLOADS = "source"
"""Subfolder of a shard set for downloaded or decompressed files."""

_OPTIONS = {"labels": ("folder",), "label": ("celeba",), "images": ("celeba",)}
"""The datasets that take each of the options that not all take."""


def check_options(config: PrepareConfig) -> None:
    """Raise InputError for an option that the dataset does not take."""
    for name, datasets in _OPTIONS.items():
        if (
            getattr(config, name) != PrepareConfig.model_fields[name].default
            and config.dataset not in datasets
        ):
            raise InputError(
                f"{name} = {getattr(config, name)}: dataset {config.dataset!r} takes no such "
                f"option, {', '.join(datasets)} does"
            )


def open_reader(config: PrepareConfig) -> Reader:
    """Open the reader of a dataset; InputError when its source is missing."""
    max_pixels = round(config.max_megapixels * 1e6)
    return READERS[config.dataset](config, config.out / DOWNLOADS, max_pixels)


@lru_cache(maxsize=1)
def cached_reader(config: PrepareConfig, _newest: int) -> Reader:
    """Open a reader, or return the last one for the next shard of the same listing.

    ``_newest`` is part of the cache's key: a source that was changed and listed again is reopened.
    """
    return open_reader(config)


def _digits(config: PrepareConfig, _downloads: Path, _max_pixels: int) -> Reader:
    from data_prep.digits import open_digits

    return open_digits(config.source)


def _mnist(config: PrepareConfig, downloads: Path, _max_pixels: int) -> Reader:
    from data_prep.mnist import open_mnist

    return open_mnist(config.source, downloads)


def _celeba(config: PrepareConfig, downloads: Path, max_pixels: int) -> Reader:
    from data_prep.celeba import CelebaReader

    return CelebaReader(config.source, downloads, max_pixels, config.images, config.label)


def _imagenet(config: PrepareConfig, downloads: Path, max_pixels: int) -> Reader:
    from data_prep.imagenet import open_imagenet

    return open_imagenet(config.source, downloads, max_pixels)


def _folder(config: PrepareConfig, downloads: Path, max_pixels: int) -> Reader:
    from data_prep.folder import FolderReader

    return FolderReader(config.source, downloads, max_pixels, config.labels)


def _webdataset(config: PrepareConfig, downloads: Path, max_pixels: int) -> Reader:
    from data_prep.webdataset import WebdatasetReader

    return WebdatasetReader(config.source, downloads, max_pixels)


READERS: dict[str, Callable[[PrepareConfig, Path, int], Reader]] = {
    "digits": _digits,
    "mnist": _mnist,
    "celeba": _celeba,
    "imagenet": _imagenet,
    "folder": _folder,
    "webdataset": _webdataset,
}
"""By dataset, a function of (config, folder for downloads, pixel limit) that opens its reader."""
