"""r2id.Pipeline: pictures in and out, in Python and by commands."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from r2id import Pipeline
from r2id.config import change
from r2id.errors import InputError
from r2id.images import to_bytes
from r2id.models.codec import Codec
from r2id.sampling import memory


def pixels(picture):
    return np.asarray(picture).astype(int)


def test_pictures_are_those_of_the_sampler(pipe):
    drawn = pipe([3, 7], size=(12, 9), seeds=[0, 1], steps=3, guidance=1.5)
    labels, seeds = torch.tensor([3, 7]), torch.tensor([0, 1])
    images = pipe.sampler.sample(labels, seeds, (12, 9), steps=3, guidance=1.5)
    assert [picture.size for picture in drawn] == [(9, 12)] * 2
    for one, other in zip(drawn, images, strict=True):
        assert one.mode == "L" and np.array_equal(pixels(one), to_bytes(other)[..., 0].numpy())


def test_classes_by_their_names(pipe):
    names = ("ant", "bee", "cat", "2", *"efghij")
    named = Pipeline(replace(pipe.sampler, class_names=names))
    by_name, by_number = named(["cat", "ant", 9]), pipe([2, 0, 9])
    assert all(map(np.array_equal, map(pixels, by_name), map(pixels, by_number)))
    assert np.array_equal(pixels(named("2")[0]), pixels(pipe(3)[0])), "a text is a name"
    edited = named.vary(by_name[0], label="cat"), pipe.vary(by_name[0], label=2)
    assert np.array_equal(*map(pixels, edited))
    with pytest.raises(InputError, match=r"label dog: must be 0 to 9, or one of ant, bee, cat, 2"):
        named("dog")


def test_names_of_digits_on_the_command_line(pipe, picture, tmp_path, r2id, monkeypatch):
    padded = tuple(f"{number:03d}" for number in range(1, 11))
    named = replace(pipe.sampler, class_names=padded)
    monkeypatch.setattr(type(named), "load", lambda *_: named)
    for label, number in (("003", 2), ("3", 3), ("010", 9)):
        given = ["sample", "run", "--label", label, "--count", 2, "--size", "8x8", "--json"]
        code, printed, errors = r2id(*given, "--out", tmp_path / f"{label}.png")
        assert code == 0, errors
        found = json.loads(printed)
        assert found["labels"] == [number] * 2 and found["class_names"] == [padded[number]] * 2
    file, out = tmp_path / "picture.png", tmp_path / "varied.png"
    picture.save(file)
    assert r2id("vary", "run", file, "--label", "003", "--out", out)[0] == 0
    assert np.array_equal(pixels(Image.open(out)), pixels(pipe.vary(picture, label=2)))
    given = ["sample", "run", "--label", "000", "--size", "8x8"]
    code, _, errors = r2id(*given, "--out", tmp_path / "none.png")
    assert code == 2 and "label 000: must be 0 to 9, or one of 001, 002" in errors


def test_it_says_what_it_is_in_a_line(pipe):
    assert repr(pipe) == "<Pipeline of pictures of 8x8, 10 classes, on cpu>"
    varied = Pipeline(replace(pipe.sampler, ratios=(0.5, 1.2)))
    expected = "<Pipeline of pictures of several sizes, in the median 8x8, 10 classes, on cpu>"
    assert repr(varied) == expected


def test_pipelines_are_keys(pipe):
    assert {pipe: 1, replace(pipe): 2}[pipe] == 1


def test_callbacks_see_each_step_and_may_end_it(pipe):
    steps = []
    drawn = pipe([1] * 20, seeds=range(20), steps=3, callback=steps.append)
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6], "two batches of three steps"
    assert {step.total for step in steps} == {6}
    last = pipe.decode(steps[2].latents, (8, 8))
    assert np.array_equal(pixels(last[5]), pixels(drawn[5])), "the last estimate is the picture"

    class Enough(Exception):
        pass

    def stop(step):
        if step.number == 2:
            raise Enough

    with pytest.raises(Enough):
        pipe(1, steps=3, callback=stop)


def test_steps_that_begin_at_the_same_noise_are_counted_one_by_one(pipe):
    """Schedules that are shifted far reach the largest noise level in several steps."""
    diffusion = change(pipe.sampler.diffusion, {"shift_exponent": 1.0})
    shifted = replace(pipe, sampler=replace(pipe.sampler, diffusion=diffusion, base_side=1e-2))
    for solver in ("dpmpp_2m", "ddim", "euler"):
        steps = []
        shifted(1, steps=8, solver=solver, callback=steps.append)
        assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_callback_changes_nothing(pipe):
    for solver in ("dpmpp_2m", "ddim"):
        given = {"labels": range(10), "seeds": range(10), "size": (10, 8), "solver": solver}
        plain, watched = pipe(**given), pipe(**given, callback=lambda step: None)
        for one, other in zip(plain, watched, strict=True):
            assert np.array_equal(pixels(one), pixels(other))


DRAWN = {"labels": 3, "size": (11, 7), "grid": (3, 5), "eta": 0.5}


@pytest.fixture(scope="module")
def fresh(r2id_run):
    """Pixels that a process of its own draws."""
    code = (
        "import r2id; "
        f"print(r2id.Pipeline.from_pretrained({str(r2id_run)!r})(**{DRAWN})[0].tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_default_dtype_changes_nothing(dtype, pipe, r2id_run, fresh):
    """Neither while it holds nor afterwards: what is cached then is float32 too."""
    torch.set_default_dtype(dtype)
    try:
        loaded = Pipeline.from_pretrained(r2id_run, device="cpu")
        found = loaded(**DRAWN)[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert str(found.tobytes()) == fresh
    assert str(pipe(**DRAWN)[0].tobytes()) == fresh


def test_latents_and_windows(pipe, picture):
    latents = pipe.encode(picture, picture)
    assert latents.shape[0] == 2 and latents.shape[2:] == (4, 4)
    whole = pipe.decode(latents, (40, 24))[0]
    part = pipe.decode(latents, (40, 24), window=(10, 3, 31, 20))[0]
    assert np.abs(pixels(whole)[10:31, 3:20] - pixels(part)).max() <= 1
    assert pipe.decode(latents)[0].size == (8, 8)
    for same in (latents.numpy(), latents.double(), latents[1:]):
        assert np.array_equal(pixels(pipe.decode(same, (40, 24))[-1]), pixels(whole))
    with pytest.raises(InputError, match="one size"):
        pipe.encode(picture, picture.resize((9, 9)))


def test_decoding_takes_the_memory_of_all_pictures_but_one_at_a_time(pipe, picture, monkeypatch):
    latents, decode, batches = pipe.encode(picture).expand(300, -1, -1, -1), Codec.decode, []

    def count(codec, latents, *rest):
        batches.append(len(latents))
        return decode(codec, latents, *rest)

    monkeypatch.setattr(Codec, "decode", count)
    pipe.decode(latents[:3])
    assert batches == [1, 1, 1]
    monkeypatch.setattr(memory, "free_memory", lambda device: 300_000_000)
    with pytest.raises(InputError, match=r"size 1000x1000: takes .* memory"):
        pipe.decode(latents, (1000, 1000))


def test_edits(pipe, picture, tmp_path):
    mask = Image.new("1", (8, 8))
    mask.paste(1, (4, 0, 8, 8))
    drawn = pipe.inpaint(picture, mask, label=3, seed=1)
    assert np.array_equal(pixels(drawn)[:, :4], pixels(picture)[:, :4])
    assert not np.array_equal(pixels(drawn)[:, 4:], pixels(picture)[:, 4:])
    wide = pipe.outpaint(picture, (8, 16), label=3)
    assert wide.size == (16, 8) and np.array_equal(pixels(wide)[:, 4:12], pixels(picture))
    assert pipe.vary(picture, 0.3, label=3, size=(16, 16)).size == (16, 16)
    assert pipe.upscale(picture, (40, 40), window=(0, 0, 10, 20)).size == (20, 10)
    assert len(pipe.interpolate(0, 1, 3, label=3)) == 3
    file = tmp_path / "colour.png"
    picture.convert("RGB").save(file)
    with Image.open(file) as opened:
        same = [pipe.vary(source, 0.3, label=3) for source in (picture, file, str(file), opened)]
    assert all(np.array_equal(pixels(one), pixels(same[0])) for one in same)


def test_the_import_loads_nothing_of_training_or_orchestration():
    code = (
        "import sys\nfrom r2id import Pipeline\n"
        "print([name for name in ('mlflow', 'prefect', 'deepspeed', 'webdataset', 'matplotlib', "
        "'sklearn', 'pyarrow', 'r2id.training', 'r2id.evaluation') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    import r2id

    with pytest.raises(AttributeError, match="Pipelines"):
        r2id.Pipelines  # noqa: B018


def test_the_commands(pipe, picture, r2id_run, riae_run, tmp_path, r2id):
    mask, file = tmp_path / "mask.png", tmp_path / "picture.png"
    picture.save(file)
    marked = Image.new("L", (8, 8))
    marked.paste(255, (0, 4, 8, 8))
    marked.save(mask)
    runs = {
        "upscale": ([r2id_run, file, "--size", "20x16"], (20, 16), None),
        "vary": (
            [r2id_run, file, "--strength", "0.4", "--label", "3", "--seed", "2"],
            (8, 8),
            lambda: pipe.vary(picture, 0.4, label=3, seed=2),
        ),
        "inpaint": (
            [r2id_run, file, mask, "--label", "3", "--steps", "3"],
            (8, 8),
            lambda: pipe.inpaint(picture, marked, label=3, steps=3),
        ),
        "outpaint": (
            [r2id_run, file, "--size", "8x16", "--at", "0,2"],
            (8, 16),
            lambda: pipe.outpaint(picture, (8, 16), (0, 2)),
        ),
        "interpolate": ([r2id_run, 0, 1, "--count", "3", "--label", "3"], (8, 24), None),
    }
    for name, (arguments, size, expected) in runs.items():
        out = tmp_path / f"{name}.png"
        code, printed, errors = r2id(name, *arguments, "--out", out, "--device", "cpu", "--json")
        assert (code, errors) == (0, ""), f"{name}: {errors}"
        assert json.loads(printed)["size"] == list(size)
        if expected:
            assert np.array_equal(pixels(Image.open(out)), pixels(expected())), name
        code, _, errors = r2id(name, *arguments, "--out", out)
        assert code == 2 and "exists already" in errors
    out = tmp_path / "of-riae.png"
    assert r2id("upscale", riae_run, file, "--size", "20x16", "--out", out)[0] == 0
    assert np.array_equal(pixels(Image.open(out)), pixels(Image.open(tmp_path / "upscale.png")))
    code, _, errors = r2id("outpaint", r2id_run, file, "--size", "9x9", "--at", "x", "--out", "a")
    assert code == 2 and "--at 'x'" in errors
