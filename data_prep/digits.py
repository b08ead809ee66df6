"""Read the handwritten digits that scikit-learn includes: 1,797 images of 8×8 in ten classes.

They are the test set of Alpaydin & Kaynak, "Optical recognition of handwritten digits" (UCI, 1998).
The library holds no other part, so a fifth of each class is set aside for testing here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data_prep.arrays import ArrayReader
from data_prep.items import stratified_test
from r2id.errors import InputError

_TEST_SHARE = 0.2
_BRIGHTEST = 16  # the largest pixel value


def open_digits(source: Path | None, _downloads: Path, _max_pixels: int) -> ArrayReader:
    """Open the digits; InputError when a source is given: the library is their only source."""
    if source is not None:
        raise InputError(f"source {source}: digits come with scikit-learn and take no source")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.round(pixels.reshape(-1, 8, 8) * (255 / _BRIGHTEST)).astype(np.uint8)
    test = stratified_test(labels, _TEST_SHARE)
    return ArrayReader(
        {"train": (images[~test], labels[~test]), "test": (images[test], labels[test])},
        [str(digit) for digit in range(10)],
    )
