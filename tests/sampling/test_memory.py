"""What is too large for the memory is refused before anything is computed."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.coords import Size
from r2id.sampling import memory
from r2id.sampling.grids import draw_grids
from r2id.sampling.reconstruction import reconstruct_file
from r2id.sampling.sampler import Sampler


@pytest.fixture
def free(monkeypatch):
    """Sets what is free."""
    return lambda number: monkeypatch.setattr(memory, "free_memory", lambda device: int(number))


def fitting(message: str) -> Size:
    """The largest size that fits: the last one that the message names."""
    height, width = re.findall(r"(\d+)x(\d+)", message)[-1]
    return int(height), int(width)


def test_samples_that_do_not_fit(r2id_run, tmp_path, free):
    free(2e9)
    with pytest.raises(InputError, match=r"size 60000x30000: .* 2 GB") as refused:
        draw_grids(r2id_run, tmp_path / "out", [(8, 8), (60000, 30000)], count=4)
    assert not (tmp_path / "out").exists()
    height, width = fitting(str(refused.value))
    assert height == pytest.approx(2 * width, abs=2)
    sampler = Sampler.load(r2id_run)
    memory.check_samples(sampler, (height, width), None, 4)
    with pytest.raises(InputError):
        memory.check_samples(sampler, (height + 20, width + 10), None, 4)


def test_a_grid_that_does_not_fit(r2id_run, free):
    free(5e7)
    sampler = Sampler.load(r2id_run)
    with pytest.raises(InputError, match="grid 900x900") as refused:
        memory.check_samples(sampler, (8, 8), (900, 900), 1)
    memory.check_samples(sampler, (8, 8), fitting(str(refused.value)), 1)


def test_a_window_of_what_does_not_fit(riae_run, tmp_path, free):
    from PIL import Image

    free(1e9)
    Image.radial_gradient("L").resize((21, 13)).save(tmp_path / "in.png")
    with pytest.raises(InputError, match=r"50000x50000.*--window"):
        reconstruct_file(riae_run, tmp_path / "in.png", tmp_path / "out.png", [(50000, 50000)])
    reconstruct_file(
        riae_run,
        tmp_path / "in.png",
        tmp_path / "out.png",
        [(50000, 50000)],
        window=(0, 49990, 20, 50000),
    )
    with pytest.raises(InputError, match="window of 50000x40000"):
        reconstruct_file(
            riae_run,
            tmp_path / "in.png",
            tmp_path / "x.png",
            [(50000, 50000)],
            window=(0, 0, 50000, 40000),
        )


@pytest.mark.parametrize(
    ("group", "free"),
    [
        ({"memory.max": "5000000000", "memory.current": "2000000000"}, 3e9),
        ({"memory.max": "5000000000", "memory.current": "6000000000"}, 0),
        ({"memory.max": "50000000000", "memory.current": "2000000000"}, 8e9),
        ({"memory.max": "max", "memory.current": "2000000000"}, 8e9),
        ({"memory.max": "5000000000", "memory.current": "4000000000", "files": "1000000000"}, 2e9),
        ({}, 8e9),
    ],
)
def test_free_memory_is_what_the_control_group_leaves(group, free, tmp_path, monkeypatch):
    files = {"memory.stat": f"anon 1000\ninactive_file {group.pop('files', 0)}\nactive_file 7"}
    for name, text in (group | files).items():
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=8e9))
    assert memory.free_memory(torch.device("cpu")) == free


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
def test_free_memory_is_of_the_machine(tmp_path, monkeypatch):
    """What the kernel says is available: here at one moment, since it changes all the time."""
    monkeypatch.setattr(memory, "_CONTROL_GROUP", tmp_path)  # no control group
    (tmp_path / "meminfo").write_text(Path("/proc/meminfo").read_text())
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    lines = (tmp_path / "meminfo").read_text().splitlines()
    available = dict(line.split(":") for line in lines)["MemAvailable"]
    assert memory.free_memory(torch.device("cpu")) == 1024 * int(available.split()[0])


def test_memory_that_torch_keeps_for_later_is_free(monkeypatch):
    for name, number in {
        "mem_get_info": (7, 100),
        "memory_reserved": 50,
        "memory_allocated": 20,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda _, number=number: number)
    assert memory.free_memory(torch.device("cuda", 0)) == 37


def test_pictures_are_held_in_the_cpus_memory(r2id_run, monkeypatch):
    """1000 pictures of 1000×1000 take more than 12 GB there; a GPU decodes one at a time."""
    monkeypatch.setattr(Codec, "device", torch.device("cuda"))
    sampler, size = Sampler.load(r2id_run), (1000, 1000)

    def free(gpu: float, cpu: float) -> None:
        there = {"cuda": int(gpu), "cpu": int(cpu)}
        monkeypatch.setattr(memory, "free_memory", lambda device: there[device.type])

    free(gpu=1e9, cpu=1e11)
    memory.check_samples(sampler, size, None, 1000)
    memory.check_edit(sampler, size, (4, 4))
    free(gpu=1e11, cpu=2e9)
    with pytest.raises(InputError, match=r"GB of memory, and 2 GB are free"):
        memory.check_samples(sampler, size, None, 1000)
    free(gpu=1e6, cpu=1e11)
    with pytest.raises(InputError, match=r"GB of the GPU's memory, and 0.001 GB are free"):
        memory.check_samples(sampler, size, None, 1000)


_MEASURE = """
import re, sys, torch
from pathlib import Path
from r2id.images import tile, to_bytes
from r2id.models.codec import Codec
codec = Codec.load(Path(sys.argv[1]))
latents = torch.zeros(1, codec.latent_channels, 2, 2)
codec.decode(latents, (64, 64))
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = peak()
image = codec.decode(latents, (1600, 1600))
to_bytes(tile(torch.cat([image, image[:0]]), 1))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_prediction_is_what_it_takes(riae_run):
    codec = Codec.load(riae_run)
    fixed, per_pixel = memory._decoding(codec, (2, 2), (1600, 1600))
    predicted = fixed + 1600 * 1600 * (per_pixel + memory._held(codec.channels))
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, riae_run], capture_output=True, check=True, text=True
    )
    assert 0.7 * int(run.stdout) < predicted < 2 * int(run.stdout)


def test_editing_takes_more_than_drawing(r2id_run, free):
    sampler, size, grid = Sampler.load(r2id_run), (3000, 4000), (4, 4)

    def fits(check, *arguments) -> bool:
        try:
            check(sampler, size, grid, *arguments)
        except InputError as error:
            assert "3000x4000: takes about" in str(error) and "the largest" in str(error)
            return False
        return True

    found = set()
    for number in (1e7, 2e8, 4e8, 6e8, 8e8, 1e9, 1e11):
        free(number)
        found.add((fits(memory.check_samples, 1), fits(memory.check_edit)))
    assert (True, False) in found and (True, True) in found and (False, True) not in found
