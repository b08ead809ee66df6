"""Files are complete or absent, and images come out as they went in."""

import json
import os
import signal
import stat
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r2id.errors import InputError, WorkError
from r2id.files import TEMPORARY, atomic_file, exclusive, sweep, write_atomic, write_json
from r2id.images import encode_png, psnr, read_image, resize, save_png, to_float, to_uint8
from tests.forked import FORKED
from tests.waiting import wait_until


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole(tmp_path: Path, durable: bool) -> None:
    path = tmp_path / "new" / "file"
    write_atomic(path, b"old", durable)
    with atomic_file(path, durable) as file:
        file.write(b"half")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"half"
    assert [found.name for found in path.parent.iterdir()] == ["file"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", b"old")
    with pytest.raises(KeyError), atomic_file(tmp_path / "file") as file:
        file.write(b"half")
        raise KeyError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WorkError, match=str(tmp_path / "file" / "below")):
        write_atomic(tmp_path / "file" / "below", b"")


def test_others_may_read_it_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_png(torch.zeros(1, 2, 2), tmp_path / "picture.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "picture.png").stat().st_mode) == 0o640


def test_sweeping_removes_what_killed_writers_left(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"file.0123{TEMPORARY}").touch()
    (tmp_path / "folder" / "file").touch()
    sweep(tmp_path)
    assert [found.name for found in (tmp_path / "folder").iterdir()] == ["file"]


def test_json_that_must_be_strict_has_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "file", {"k": float("nan")})
    assert np.isnan(json.loads((tmp_path / "file").read_text())["k"])
    with pytest.raises(ValueError):
        write_json(tmp_path / "file", {"k": float("nan")}, allow_nan=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_from_its_file(tmp_path: Path, channels: int) -> None:
    image = to_float(torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8))
    path = save_png(image, tmp_path / "picture.png")
    assert torch.equal(read_image(path, channels), image)
    assert path.read_bytes() == encode_png(image)
    with Image.open(path) as picture:
        assert picture.size == (7, 5)


def test_no_picture_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no picture")
    for name in ("text", "nowhere"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name, 1)


def test_bytes_are_rounded_and_clipped() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_uint8(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


def test_resizing_is_not_clipped_and_float32() -> None:
    edge = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64).expand(1, 1, 4, 4)
    assert torch.equal(resize(edge, (4, 4)), edge.float())
    larger = resize(edge, (8, 16))
    assert larger.dtype == torch.float32 and larger.shape == (1, 1, 8, 16)
    assert larger.max() > 1, "bicubic overshoots at edges"


def test_psnr_of_known_errors() -> None:
    found = psnr(torch.tensor([4.0, 0.04, 0.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 20.0, 106.0206]))


def work_in(folder: Path, ready: Path, with_child: bool) -> None:
    """Hold a folder until killed; with a forked child, as loader processes are."""
    with exclusive(folder):
        child = os.fork() if with_child else None
        if child != 0:
            ready.write_text(str(child or 0))
        time.sleep(60)


@pytest.mark.parametrize("with_child", [False, True])
def test_a_folder_has_one_process_at_work(tmp_path: Path, with_child: bool) -> None:
    """A second one is told at once; a killed one holds it no longer, even if its child lives."""
    folder, ready = tmp_path / "new" / "folder", tmp_path / "ready"
    first = FORKED.Process(target=work_in, args=(folder, ready, with_child))
    first.start()
    wait_until(lambda: ready.exists() and ready.read_text(), alive=first)
    with pytest.raises(WorkError, match=f"{folder}: another process"), exclusive(folder):
        pass
    first.kill()
    first.join()
    with exclusive(folder):
        pass
    with exclusive(folder):  # and again, after its end
        pass
    assert not list(folder.iterdir())
    if with_child:
        os.kill(int(ready.read_text()), signal.SIGKILL)


def test_a_folder_that_cannot_be_worked_in_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file: exists and is no f"), exclusive(tmp_path / "file"):
        pass
    with pytest.raises(WorkError, match="file/below: "), exclusive(tmp_path / "file" / "below"):
        pass
