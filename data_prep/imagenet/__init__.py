"""Read ImageNet-1k (Russakovsky et al. 2015) in the four layouts in which it is distributed.

* As published (published.py): ``ILSVRC2012_img_train.tar``, a tar of one tar per class,
  ``ILSVRC2012_img_val.tar``, and the development kit with the labels of the validation images. The
  tars are read in place, never unpacked.
* Kaggle's (folders.py): ``ILSVRC/Data/CLS-LOC/{train/<wnid>,val,test}`` with
  ``LOC_val_solution.csv`` and ``LOC_synset_mapping.txt``.
* Folders (folders.py): ``<wnid>/``, or ``train/<wnid>/`` and ``val/<wnid>/``.
* Hugging Face's (parquet.py): ``{train,validation,test}-00000-of-00294.parquet``, at the top or in
  ``data/``.

Classes are numbered from 0 to 999 in the sorted order of their WordNet ids. The development kit
numbers them from 1 in another order, and maps its numbers to WordNet ids in ``meta.mat``.
"""

from __future__ import annotations

from pathlib import Path

from data_prep.folder import SPLITS
from data_prep.imagenet.folders import FolderImagenet
from data_prep.imagenet.parquet import ParquetImagenet, parquet_files
from data_prep.imagenet.published import TARS, TarImagenet
from data_prep.imagenet.wordnet import WNID
from data_prep.items import Reader
from data_prep.tables import first_existing
from r2id.errors import InputError


def open_imagenet(source: Path, unpacked: Path, max_pixels: int) -> Reader:
    """Return the reader of the layout that the source has; InputError when it has none of them."""
    if not source.is_dir():
        raise InputError(f"source {source}: is no folder")
    if any((source / name).is_file() for names in TARS.values() for name in names):
        return TarImagenet(source, unpacked, max_pixels)
    kaggle = first_existing(source, ("", "ILSVRC"), ("Data/CLS-LOC",))
    if kaggle:
        return FolderImagenet(source, kaggle, max_pixels)
    parquet = next((folder for folder in (source / "data", source) if parquet_files(folder)), None)
    if parquet:
        return ParquetImagenet(parquet, max_pixels)
    if any(
        WNID.fullmatch(path.name)
        for folder in (source, *(source / name for name in SPLITS))
        if folder.is_dir()
        for path in folder.iterdir()
    ):
        return FolderImagenet(source, source, max_pixels)
    raise InputError(
        f"source {source}: no ImageNet: neither {TARS['train'][0]} or {TARS['val'][0]}, nor "
        "ILSVRC/Data/CLS-LOC, nor data/train-*.parquet, nor folders named by WordNet ids "
        "such as n01440764"
    )
