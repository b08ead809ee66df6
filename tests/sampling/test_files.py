"""Sample files: the same bytes whoever draws them, when, and however many; killed and resumed."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from PIL import Image

from r2id.config import load_config
from r2id.data.shards import ShardSet
from r2id.data.verify import verify
from r2id.errors import InputError
from r2id.images import to_bytes
from r2id.sampling.files import REQUEST, RESULT, draw_many
from r2id.sampling.sampler import Sampler
from r2id.sampling.shards import shard_length
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_R2ID
from tests.training import children
from tests.training.children import Ranks
from tests.waiting import wait_until

COUNT, SIZE = 150, (9, 7)
"""Three batches, the last of which is not whole."""
SETTINGS = {"steps": 2, "guidance": 1.0, "solver": None}


def draw(run: Path, out: Path, kind: str = "png", count: int = COUNT, **options) -> dict:
    return draw_many(
        run, out, [SIZE], kind=kind, count=count, **{"seed": 5, "settings": SETTINGS, **options}
    )


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def pictures(r2id_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bulk") / "pictures"
    draw(r2id_run, out)
    return out


@pytest.fixture(scope="module")
def shards(r2id_run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("bulk") / "shards"
    draw(r2id_run, out, "shards")
    return out


def test_every_sample_is_the_one_of_its_seed(r2id_run, pictures):
    sampler = Sampler.load(r2id_run)
    numbers = torch.tensor([0, 1, 63, 64, 149])
    images = to_bytes(sampler.sample(numbers % 10, 5 + numbers, SIZE, steps=2, guidance=1.0))
    for number, image in zip(numbers.tolist(), images, strict=True):
        with Image.open(pictures / "images" / f"{number:08d}.png") as picture:
            assert picture.size == (7, 9) and picture.mode == "L"
            drawn = (
                torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
                .reshape(9, 7)
                .int()
            )
        assert torch.equal(drawn, image[..., 0].int())
    assert len(list((pictures / "images").iterdir())) == COUNT
    facts = json.loads((pictures / REQUEST).read_text())
    assert (
        facts["count"] == COUNT
        and facts["steps"] == 2
        and facts["solver"] == sampler.defaults.solver
    )
    assert json.loads((pictures / RESULT).read_text()) == {
        **facts,
        "digest": draw(r2id_run, pictures)["digest"],
    }


def test_fewer_samples_are_the_first_of_many(r2id_run, pictures, tmp_path):
    draw(r2id_run, tmp_path / "few", count=70)
    files = content(tmp_path / "few" / "images")
    assert len(files) == 70 and files.items() <= content(pictures / "images").items()


def test_shards_hold_the_same_samples_and_are_a_shard_set(pictures, shards):
    assert verify(shards) == []
    opened = ShardSet.open(shards)
    split = opened.split("samples")
    assert (
        len(split) == COUNT
        and opened.num_classes == 10
        and (split.height == 9).all()
        and (split.width == 7).all()
    )
    assert split.label.tolist() == [number % 10 for number in range(COUNT)]
    for number in range(COUNT):
        assert split.key(number) == f"{number:08d}"
        assert split.read(number) == (pictures / "images" / f"{number:08d}.png").read_bytes()


def test_two_processes_write_the_same(r2id_run, pictures, tmp_path):
    out = tmp_path / "two"
    options = "--format png --size 9x7 --seed 5 --steps 2 --guidance 1 --json --count"
    with closing(Ranks(2, tmp_path / "said")) as ranks:
        command = ("sample", r2id_run, "--out", out, *options.split(), COUNT)
        assert ranks(children.command, *command) == [0, 0]
    said = (tmp_path / "said").read_text()
    assert said.count(f'"images": {COUNT}') == 1, "the first process alone reports"
    assert content(out) == content(pictures)


@pytest.mark.parametrize("kind", ["png", "shards"])
def test_killed_and_gone_on_with(r2id_run, tmp_path, kind):
    """Killed as soon as there is a shard, or more than a batch, in the middle of the rest."""
    count, enough = {"png": (200, 65), "shards": (600, 1)}[kind]  # four batches, two shards
    out = tmp_path / "killed"

    def written() -> int:
        return len([*out.glob("images/*.png"), *out.glob("samples/*.parquet")])

    with children.ended(children.start(draw, r2id_run, out, kind, count)) as child:
        wait_until(lambda: written() >= enough, alive=child, every=0.001)
        child.kill()
        child.join()
    assert written() >= enough and not (out / RESULT).exists()
    with pytest.raises(InputError, match=f"count = {count}.*150"):
        draw(r2id_run, out, kind)
    result = draw(r2id_run, out, kind, count)
    assert 0 < result["reused"] < count
    draw(r2id_run, tmp_path / "whole", kind, count)
    assert content(out) == content(tmp_path / "whole")
    assert draw(r2id_run, out, kind, count)["reused"] == count


def test_what_it_refuses(r2id_run, riae_run, pictures, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("")
    before = content(pictures)
    for out, options, message in [
        (tmp_path / "file", {}, f"{tmp_path}/file"),
        (tmp_path / "full", {}, r"letter\.txt"),
        (pictures, {"settings": {**SETTINGS, "steps": 3}}, "steps = 2.*3"),
        (pictures, {"seed": 6}, "first_seed = 5.*6"),
        (pictures, {"kind": "shards"}, "format = 'png'.*'shards'"),
        (pictures, {"labels": (10,)}, "label 10: .*9"),
    ]:
        with pytest.raises(InputError, match=message):
            draw(r2id_run, out, **options)
    with pytest.raises(InputError, match=r"--size.* 2"):
        draw_many(r2id_run, tmp_path / "new", [(8, 8), (9, 9)], kind="png")
    with pytest.raises(InputError, match="not 'r2id'"):
        draw(riae_run, tmp_path / "new")
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / REQUEST).write_text('{"count"')
    with pytest.raises(InputError, match=f"{tmp_path}/cut/{REQUEST}"):
        draw(r2id_run, tmp_path / "cut")
    assert content(pictures) == before and not (tmp_path / "new").exists()


def test_a_run_without_conditions_has_no_guidance(digits, riae_run, latents, tmp_path):
    """Its config may have a scale, which is for models of classes. A scale that is asked for is
    refused before anything is written."""
    named = [f"data.shards={digits}", f"codec={riae_run}", f"data.latents={latents}"]
    more = ["train.steps=1", "r2id.condition=none", f"run={tmp_path}/r2id", "sample.guidance=1.5"]
    config = load_config(CONFIGS / "digits" / "r2id.toml", [*TINY_R2ID, *named, *more])
    train(config)
    with pytest.raises(InputError, match=r"guidance 1\.5: .*must be 0 or 1"):
        draw(config.run, tmp_path / "out", count=2, settings={"guidance": 1.5})
    assert not (tmp_path / "out").exists()
    draw(config.run, tmp_path / "out", count=2, settings={"steps": 1})
    assert json.loads((tmp_path / "out" / RESULT).read_text())["guidance"] == 1.0


@pytest.mark.parametrize(
    "size", [(1, 1), (28, 28), (100, 300), (256, 256), (1024, 1024), (5000, 3000)]
)
def test_batches_fill_shards_and_stay_small(r2id_run, size):
    sampler, pixels = Sampler.load(r2id_run), size[0] * size[1]
    for grid in (None, (16, 16), (70, 70)):
        batch = sampler.batch_length(size, grid)
        assert shard_length(size, batch) % batch == 0 and 1 <= batch <= 64
        assert batch == 1 or batch * pixels <= 1 << 20
        assert grid is None or batch == 1 or batch * grid[0] * grid[1] <= 4096
        assert shard_length(size, batch) == batch or shard_length(size, batch) * pixels <= 1 << 23
