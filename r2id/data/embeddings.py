"""Read and write text embeddings as ``.npy`` files.

Shape letters: D values · T tokens of a text · N texts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from r2id.errors import InputError

DTYPE = np.dtype("<f2")
"""The type that all embeddings are stored as."""

_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def parse_npy(data: bytes) -> np.ndarray:
    """Parse a ``.npy`` file of 16-, 32- or 64-bit floats; ValueError when it holds anything else.

    It is safe for untrusted files, unlike numpy.load: it never unpickles, and it compares the
    length of the data with the header's shape before it allocates memory.
    """
    file = io.BytesIO(data)
    try:
        shape, by_columns, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
    except Exception as error:  # numpy's parser fails in many ways on damaged headers
        raise ValueError(f"no .npy file: {' '.join(str(error).split())}") from None
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise ValueError(f"values of type {dtype}; must be float16, float32 or float64")
    if math.prod(shape) * dtype.itemsize != len(data) - file.tell():
        raise ValueError(
            f"{len(data) - file.tell()} bytes of values, not those of shape {list(shape)}"
        )
    return np.frombuffer(data, dtype, offset=file.tell()).reshape(
        shape, order="F" if by_columns else "C"
    )


def to_stored(values: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Convert an embedding to float16; ValueError for another shape or values not finite then."""
    if list(values.shape) != list(shape):
        raise ValueError(f"of shape {list(values.shape)}, not {list(shape)}")
    return _rounded(values)


def npy_bytes(values: np.ndarray) -> bytes:
    """Encode an array as ``.npy`` bytes; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0))
    return buffer.getvalue()


def read_embeddings(path: Path, shape: Sequence[int]) -> np.ndarray:
    """Read one embedding of ``shape`` ([D] or [T, D]), or N of them, from a file: float16 [N, …].

    Raises InputError for any other shape, or values that are not finite in float16.
    """
    try:
        values = parse_npy(path.read_bytes())
        if list(values.shape) == list(shape):
            values = values[None]
        if list(values.shape[1:]) != list(shape) or not len(values):
            wanted = ", ".join(map(str, shape))
            raise ValueError(f"of shape {list(values.shape)}; must be [{wanted}] or [N, {wanted}]")
        return _rounded(values)
    except OSError as error:
        raise InputError(f"embedding {path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"embedding {path}: {error}") from None


def _rounded(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which is refused below
        rounded = values.astype(DTYPE)
    if not np.isfinite(rounded).all():
        raise ValueError("values that are not finite in float16")
    return rounded
