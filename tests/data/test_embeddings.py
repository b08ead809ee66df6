"""Files of embeddings: what they may hold, and what is wrong with the others."""

import io

import numpy as np
import pytest

from r2id.data.embeddings import npy_bytes, parse_npy, read_embeddings, to_stored
from r2id.errors import InputError

VALUES = np.arange(6).reshape(2, 3) / 7


def saved(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_floats_of_any_width_and_order(dtype, order):
    array = np.asarray(VALUES, dtype, order=order)
    assert np.array_equal(parse_npy(saved(array)), array)
    stored = to_stored(parse_npy(saved(array)), [2, 3])
    assert stored.dtype == np.float16 and np.array_equal(stored, array.astype(np.float16))


def test_files_are_those_of_numpy():
    stored = to_stored(VALUES, [2, 3])
    assert np.array_equal(np.load(io.BytesIO(npy_bytes(stored))), stored) and npy_bytes(
        stored
    ) == npy_bytes(stored.copy())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no .npy file"),
        (b"text", "no .npy file"),
        (saved(VALUES)[:20], "no .npy file"),
        (saved(VALUES)[:-1], r"47 bytes of values, not those of shape \[2, 3\]"),
        (saved(VALUES) + b"1", "49 bytes of values"),
        (saved(np.arange(3)), "values of type int64; must be float16"),
        (saved(np.zeros(3, complex)), "values of type complex128"),
        (saved(np.array([{}]), allow_pickle=True), "type object"),
        (saved(VALUES).replace(b"(2, 3)", b"(9**9)"), "no .npy file"),
        (
            saved(np.zeros(1)).replace(b"(1,), }" + b" " * 12, b"(999999999999999,)}"),
            "8 bytes of values, not those",
        ),
    ],
)
def test_what_is_no_array_of_floats(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_npy(data)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.zeros(6), r"of shape \[6\], not \[2, 3\]"),
        (np.full((2, 3), np.nan), "not finite in float16"),
        (np.full((2, 3), -np.inf), "not finite in float16"),
        (np.full((2, 3), 1e5), "not finite in float16"),
    ],
)
def test_what_cannot_be_stored(values, reason):
    with pytest.raises(ValueError, match=reason):
        to_stored(values, [2, 3])


def test_one_or_several_to_be_told(tmp_path):
    file = tmp_path / "x.npy"
    for array in (VALUES, VALUES[None], np.stack([VALUES] * 4)):
        np.save(file, array)
        assert np.array_equal(
            read_embeddings(file, (2, 3)), array.reshape(-1, 2, 3).astype(np.float16)
        )
    for array, reason in [
        (VALUES[0], r"of shape \[3\]; must be \[2, 3\] or \[N, 2, 3\]"),
        (np.zeros((0, 2, 3)), r"\[0, 2, 3\]"),
        (np.zeros((1, 1, 2, 3)), "must be"),
        (np.full((2, 3), np.inf), "not finite"),
    ]:
        np.save(file, array)
        with pytest.raises(InputError, match=rf"x\.npy: .*{reason}"):
            read_embeddings(file, (2, 3))
    with pytest.raises(InputError, match=r"none\.npy"):
        read_embeddings(tmp_path / "none.npy", (2, 3))
