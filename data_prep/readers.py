"""The readers by name."""

from __future__ import annotations

from functools import lru_cache

from data_prep.base import Reader
from r2id.config import PrepareConfig
from r2id.errors import InputError

DOWNLOADS = "source"
"""Subfolder of a set for files that are downloaded or decompressed."""

_OPTIONS = {"labels": ("folder",), "label": ("celeba",), "images": ("celeba",)}
"""Which datasets take which options."""


def check_options(config: PrepareConfig) -> None:
    """InputError for an option that the dataset does not take."""
    for name, datasets in _OPTIONS.items():
        if (
            getattr(config, name) != PrepareConfig.model_fields[name].default
            and config.dataset not in datasets
        ):
            raise InputError(
                f"{name} = {getattr(config, name)}: dataset {config.dataset!r} takes no such option, "
                f"{', '.join(datasets)} does"
            )


def open_reader(config: PrepareConfig) -> Reader:
    """InputError when the source is missing or no such dataset. Imports are of the one that is needed."""
    source, downloads, max_pixels = (
        config.source,
        config.out / DOWNLOADS,
        round(config.max_megapixels * 1e6),
    )
    if config.dataset == "digits":
        from data_prep.digits import open_digits

        return open_digits(source)
    if config.dataset == "mnist":
        from data_prep.mnist import open_mnist

        return open_mnist(source, downloads)
    if config.dataset == "celeba":
        from data_prep.celeba import CelebaReader

        return CelebaReader(source, downloads, max_pixels, config.images, config.label)
    if config.dataset == "imagenet":
        from data_prep.imagenet import open_imagenet

        return open_imagenet(source, downloads, max_pixels)
    if config.dataset == "webdataset":
        from data_prep.webdataset import WebdatasetReader

        return WebdatasetReader(source, downloads, max_pixels)
    from data_prep.folder import FolderReader

    return FolderReader(source, downloads, max_pixels, config.labels)


@lru_cache(maxsize=1)
def keep_reader(config: PrepareConfig, _newest: int) -> Reader:
    """open_reader, but the same one for the next shard of the same listing."""
    return open_reader(config)
