"""An R2ID relies on its RIAE: whatever becomes of the RIAE's run, the R2ID goes on and draws."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.files import CODEC, write_description, write_whole
from r2id.checkpoints.reading import find_damages
from r2id.config import load_config
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.riae import RIAE
from r2id.sampling.sampler import Sampler
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_R2ID, TINY_RIAE


def train_riae(shards: Path, folder: Path, steps: int) -> None:
    more = [f"run={folder}/riae", f"data.shards={shards}", f"train.steps={steps}", "train.keep=1"]
    more += ["train.preview_every=100"]
    train(load_config(CONFIGS / "digits" / "riae.toml", [*TINY_RIAE, *more]))


def train_r2id(shards: Path, folder: Path, run: str, steps: int) -> dict[str, Any]:
    named = [f"run={folder}/{run}", f"data.shards={shards}", f"codec={folder}/riae"]
    named += [f"data.latents={folder}/latents", f"train.steps={steps}", "train.preview_every=100"]
    overrides = [*TINY_R2ID, *named]
    return train(load_config(CONFIGS / "digits" / "r2id.toml", overrides))


def draw(run: Path) -> torch.Tensor:
    return Sampler.load(run).sample(torch.tensor([3, 7]), torch.arange(2), (9, 7))


def test_an_riae_is_trained_on_under_its_r2id(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The R2ID draws the same, and goes on as if nothing had happened."""
    train_riae(digits, tmp_path, 2)
    encode(tmp_path / "riae", digits, tmp_path / "latents")
    train_r2id(digits, tmp_path, "whole", 4)
    train_r2id(digits, tmp_path, "parts", 2)
    before = draw(tmp_path / "parts")
    train_riae(digits, tmp_path, 4)
    assert not (tmp_path / "riae" / "checkpoints" / "step-00000002").exists()
    assert torch.equal(draw(tmp_path / "parts"), before)
    capsys.readouterr()
    train_r2id(digits, tmp_path, "parts", 4)
    said = capsys.readouterr().err
    assert f"codec {tmp_path}/riae: is another RIAE now" in said
    assert "from step 2, with other settings than before: train.steps = 2 → 4\n" in said
    for kind in ("model", "ema", "optimizer"):
        one, other = (Checkpoint.open(tmp_path / run).tensors(kind) for run in ("whole", "parts"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    shutil.rmtree(tmp_path / "riae")
    assert train_r2id(digits, tmp_path, "parts", 4)["step"] == 4
    assert "is gone" in capsys.readouterr().err
    assert torch.equal(draw(tmp_path / "parts"), draw(tmp_path / "whole"))
    with pytest.raises(InputError, match=f"{tmp_path}/riae: no such folder"):
        train_r2id(digits, tmp_path, "new", 4)  # a run that begins needs the one that it names


def test_pictures_have_the_size_of_the_r2ids_images(digits: Path, tmp_path: Path) -> None:
    """Not that of the images that its RIAE was trained on."""
    data = [f"data.shards={digits}", "data.size=[4,4]", "train.steps=1"]
    train(load_config(CONFIGS / "digits/riae.toml", [*TINY_RIAE, *data, f"run={tmp_path}/riae"]))
    named = [f"run={tmp_path}/r2id", f"data.shards={digits}", f"codec={tmp_path}/riae"]
    config = load_config(CONFIGS / "digits/r2id.toml", [*TINY_R2ID, *named, "train.steps=1"])
    images = config.data.model_copy(update={"latents": None})
    train(config.model_copy(update={"data": images}))
    assert Codec.load(tmp_path / "riae").image == (4, 4)
    assert Sampler.load(tmp_path / "r2id").codec.image == (8, 8)


def test_an_r2id_refuses_another_codec_that_its_config_names(
    digits: Path, r2id_run: Path, tmp_path: Path
) -> None:
    train_riae(digits, tmp_path, 2)
    shutil.copytree(r2id_run, tmp_path / "r2id")
    with pytest.raises(InputError, match=r"another RIAE \(codec_hash"):
        train(
            load_config(
                r2id_run / "config.toml",
                [f"run={tmp_path}/r2id", f"codec={tmp_path}/riae", "train.steps=50"],
            )
        )


def test_checkpoints_of_an_r2id_are_whole(riae_run: Path, r2id_run: Path, tmp_path: Path) -> None:
    """Copied alone, one draws; its RIAE is the one that it was trained with, by every number."""
    folder = Path(shutil.copytree(Checkpoint.open(r2id_run).path, tmp_path / "alone"))
    assert torch.equal(draw(folder), draw(r2id_run))
    inner = RIAE.from_pretrained(folder / CODEC)
    outer = Checkpoint.open(riae_run).tensors("ema")
    assert {name: value.tolist() for name, value in inner.state_dict().items()} == {
        name: value.tolist() for name, value in outer.items()
    }
    data = bytearray((folder / CODEC).read_bytes())
    data[-1] ^= 1
    (folder / CODEC).write_bytes(data)
    assert find_damages(folder) == [
        f"{folder / CODEC}: damaged: its bytes are not those that were saved"
    ]
    with pytest.raises(InputError, match=f"{folder / CODEC}: damaged"):
        Sampler.load(folder)


def test_a_checkpoint_with_another_riae_in_its_place_is_refused(
    digits: Path, r2id_run: Path, tmp_path: Path
) -> None:
    """Whole by every hash, but the R2ID's latents are not those of this RIAE."""
    train_riae(digits, tmp_path, 2)
    folder = Path(shutil.copytree(Checkpoint.open(r2id_run).path, tmp_path / "step-00000040"))
    other = Codec.load(tmp_path / "riae").export()
    assert other is not None
    opened = Checkpoint.open(folder)
    write_description(folder, opened.meta, opened.files | write_whole(folder, CODEC, other))
    assert not find_damages(folder)
    with pytest.raises(InputError, match=f"{folder / CODEC}: not the RIAE that {folder} was"):
        draw(folder)


def as_before(run: Path) -> None:
    """Rewrite a run's checkpoint as versions wrote it that only named the RIAE."""
    checkpoint = Checkpoint.open(run)
    files = {name: fact for name, fact in checkpoint.files.items() if name != CODEC}
    (checkpoint.path / CODEC).unlink()
    write_description(checkpoint.path, checkpoint.meta, files)


def test_older_checkpoints_find_the_riae_that_they_name(digits: Path, tmp_path: Path) -> None:
    """Beside them, through links of either folder, and after both were moved together."""
    home = tmp_path / "home"
    train_riae(digits, home, 2)
    encode(home / "riae", digits, home / "latents")
    train_r2id(digits, home, "r2id", 2)
    expected = draw(home / "r2id")
    as_before(home / "r2id")
    assert torch.equal(draw(home / "r2id"), expected)
    links = tmp_path / "links"
    links.mkdir()
    (links / "r2id").symlink_to(home / "r2id")
    assert torch.equal(draw(links / "r2id"), expected)  # by where the link leads
    moved = tmp_path / "moved"
    home.rename(moved)
    assert torch.equal(draw(moved / "r2id"), expected)
    (moved / "r2id").rename(tmp_path / "elsewhere")
    (moved / "r2id").symlink_to(tmp_path / "elsewhere")
    assert torch.equal(draw(moved / "r2id"), expected)  # by where the link is
    shutil.rmtree(moved / "riae" / "checkpoints")
    with pytest.raises(InputError, match=r"was trained with the RIAE there.*is not there"):
        draw(moved / "r2id")
