"""Small sources in the real formats, and the real data where R2ID_DATA says where it is."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.prepare import prepare
from r2id.config import PrepareConfig
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError


@pytest.fixture
def real_data():
    folder = os.environ.get("R2ID_DATA")
    if not folder:
        pytest.skip("R2ID_DATA is not set: no real data to test with")
    return Path(folder)


def make(dataset, out, source=None, **options):
    return ShardSet.open(prepare(PrepareConfig(dataset=dataset, source=source, out=out, **options)))


def prepare_as_nobody(config, said):
    """Prepare as a user without rights; what it fails with is written to the file ``said``."""
    os.setuid(65534)
    try:
        prepare(config)
        said.write_text("")
    except (InputError, WorkError) as error:
        said.write_text(str(error))


def files_of(folder):
    """Every file of a folder, with its bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def idx(array):
    return (
        bytes((0, 0, 8, array.ndim))
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )


def write_mnist(folder, train=50, test=20, packed=False, height=28, width=28):
    """Random images and labels as the four IDX files of MNIST; returns them."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    arrays = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, height, width), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", labels),
        ):
            content = idx(array)
            (folder / f"{name}.gz" if packed else folder / name).write_bytes(
                gzip.compress(content) if packed else content
            )
        arrays[prefix] = images, labels
    return arrays


def write_images(folder, names, size=(6, 5)):
    """Images whose pixels depend on their place in the list; the suffix gives the format."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), number % 256, np.uint8)).save(path)
