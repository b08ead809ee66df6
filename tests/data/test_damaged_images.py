"""Damaged images of every format that Pillow decodes are refused with a reason, and end nothing."""

import errno
import io
import os

import numpy as np
import pytest
from PIL import Image, features

from r2id.data.pixels import decoding
from r2id.data.records import as_png, decode, inspect
from r2id.errors import WorkError
from tests.data.image_files import tiff
from tests.data.test_pixels import other_formats, ramp
from tests.data_prep.archives import rejected
from tests.data_prep.conftest import make, write_images

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F")
MUTATIONS = 30  # of each file


def written():
    """A file of each format and mode that Pillow writes, and some of those that it only reads."""
    Image.init()
    files = {f"{name} by hand": data for name, data in other_formats().items()}
    for kind in ("i1", "i2", "u4"):
        files[f"TIFF {kind}"] = tiff(ramp(kind), packed=True)
    colours = Image.fromarray(ramp("u1", (24, 32, 3)))
    for kind in sorted(Image.SAVE):
        for mode in MODES:
            grey = colours.convert("L") if mode in ("I;16", "I", "F") else colours
            file = io.BytesIO()
            try:
                grey.convert(mode).save(file, kind)
                with Image.open(io.BytesIO(file.getvalue())) as image:
                    image.load()
            except Exception:
                continue  # Pillow writes no such mode in this format, or does not read the format
            files[f"{kind} {mode}"] = file.getvalue()
    return files


def damage(data, generator):
    """One of the ways in which files are damaged on disks and on the way."""
    found = np.frombuffer(data, np.uint8).copy()
    place = int(generator.integers(len(found)))
    header = min(64, len(found))
    match int(generator.integers(5)):
        case 0:
            return found[:place].tobytes()
        case 1:
            found[place:] = 0
        case 2:
            found[generator.integers(0, len(found), 10)] = generator.integers(0, 256, 10)
        case 3:
            found[generator.integers(0, header, 3)] = generator.integers(0, 256, 3)
        case 4:
            found[place : place + 16] = 255
    return found.tobytes()


def test_a_decoder_that_fails_in_a_way_of_its_own(tmp_path):
    """Pillow's AVIF decoder raises RuntimeError, and not what it raises for other formats."""
    if not features.check("avif"):
        pytest.skip("this Pillow decodes no AVIF")
    down, across = np.mgrid[0:128, 0:128] / 128
    colours = [255 * down, 255 * across, 127 * (1 + np.sin(9 * down * across))]
    file = io.BytesIO()
    Image.fromarray(np.stack(colours, -1).astype(np.uint8)).save(file, "AVIF")
    data = file.getvalue()
    left = len(data) * 9 // 10
    write_images(tmp_path / "in", [f"{number}.png" for number in range(3)])
    (tmp_path / "in/zeros.jpg").write_bytes(data[:left] + bytes(len(data) - left))
    (tmp_path / "in/whole.jpg").write_bytes(data)
    shards = make("folder", tmp_path / "set", tmp_path / "in")
    assert sum(shards.summary()["samples"].values()) == 4
    reasons = rejected(tmp_path / "set")
    assert list(reasons) == ["zeros.jpg"]
    assert reasons["zeros.jpg"].startswith("not a readable image: RuntimeError: Failed to decode")


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        *(OSError(code, os.strerror(code)) for code in (errno.ENOSPC, errno.EIO, errno.EMFILE)),
    ],
)
def test_faults_of_the_system_are_not_the_images(fault):
    with pytest.raises(WorkError, match="cannot be decoded"), decoding():
        raise fault


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, RecursionError, ZeroDivisionError])
def test_any_other_fault_is_a_reason(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: some words"), decoding():
        raise kind("some\nwords")


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_signals_end_the_work(signal):
    with pytest.raises(signal), decoding():
        raise signal


@pytest.mark.slow
def test_no_damage_of_any_format_is_more_than_a_reason():
    files = written()
    assert {"AVIF RGB", "GIF P", "JPEG RGB", "PNG RGBA", "TIFF F", "WEBP RGB"} <= files.keys()
    generator = np.random.default_rng(0)
    outcomes = {"whole": 0, "refused": 0}
    for name, data in files.items():
        for number in range(MUTATIONS):
            damaged = damage(data, generator)
            try:
                if inspect(damaged, max_pixels=10**6).ext is None:
                    as_png(damaged)
                decode(damaged)
            except ValueError as error:
                assert str(error), f"{name}, mutation {number}"
                assert "\n" not in str(error), f"{name}, mutation {number}"
                outcomes["refused"] += 1
            else:
                outcomes["whole"] += 1
    assert sum(outcomes.values()) > 3000 and min(outcomes.values()) > 100
