"""Runs, checkpoints and latents of the other kind of RIAE: what loads, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.checkpoints import Checkpoint
from r2id.checkpoints.export import export
from r2id.checkpoints.files import Meta, read_description, write_description
from r2id.config import load_config
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.riae import RIAE
from r2id.sampling.sampler import Sampler
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.training.configs import attention_config, r2id_config, riae_config

NEW = {
    "riae": ("kind", "linear", "lapped", "features"),
    "loss": ("equivariance", "equivariance_scales", "magnify", "magnify_scales"),
}
"""Settings that came with the lattice, and later."""


@pytest.fixture(scope="module")
def attention_run(digits: Path, build_once: Any) -> Path:
    """Run directory of an RIAE by attention, as version 0.1 left it: without those settings."""

    def build(folder: Path) -> None:
        train(attention_config(digits, folder / "run", "train.steps=3"))
        checkpoint = Checkpoint.open(folder / "run").path
        description, _ = read_description(checkpoint)
        facts = {name: getattr(description, name) for name in Meta.model_fields}
        del facts["config"]["start"]
        for section, names in NEW.items():
            for name in names:
                del facts["config"][section][name]
        write_description(checkpoint, Meta(**facts), description.files)

    return build_once("attention", build) / "run"


def refusal(work: Any, *given: Any) -> str:
    with pytest.raises(InputError) as caught:
        work(*given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_of_version_0_1_is_used_as_before(
    attention_run: Path, digits: Path, tmp_path: Path
) -> None:
    codec = Codec.load(attention_run)
    assert codec.riae is not None and codec.riae.kind == "attention"
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    latents = codec.encode(images)
    assert codec.decode(latents, (16, 12)).shape == (2, 1, 16, 12)
    export(attention_run, tmp_path / "riae.safetensors")
    model = RIAE.from_pretrained(tmp_path / "riae.safetensors")
    torch.testing.assert_close(model.encode(images), latents, atol=1e-5, rtol=1e-5)
    encode(attention_run, digits, tmp_path / "latents")
    config = r2id_config(
        digits,
        attention_run,
        tmp_path / "r2id",
        "train.steps=2",
        f"data.latents={tmp_path}/latents",
    )
    train(config)
    pictures = Sampler.load(tmp_path / "r2id").sample(
        torch.tensor([3]), torch.tensor([0]), size=(8, 8)
    )
    assert pictures.shape == (1, 1, 8, 8)


def test_a_run_of_version_0_1_goes_on(attention_run: Path, digits: Path, tmp_path: Path) -> None:
    shutil.copytree(attention_run, tmp_path / "run")
    assert train(attention_config(digits, tmp_path / "run", "train.steps=5"))["step"] == 5
    begun = attention_config(
        digits, tmp_path / "next", "train.steps=1", f"init_from={attention_run}"
    )
    assert train(begun)["step"] == 1


def test_a_lattice_of_before_lapping_is_used_and_goes_on_without(
    digits: Path, tmp_path: Path
) -> None:
    config = riae_config(digits, tmp_path / "run", "train.steps=2", "riae.lapped=false")
    train(config)
    checkpoint = Checkpoint.open(config.run).path
    description, _ = read_description(checkpoint)
    facts = {name: getattr(description, name) for name in Meta.model_fields}
    del facts["config"]["riae"]["lapped"]
    write_description(checkpoint, Meta(**facts), description.files)
    codec = Codec.load(config.run)
    assert codec.riae is not None and not codec.riae.lapped
    export(config.run, tmp_path / "riae.safetensors")
    assert not RIAE.from_pretrained(tmp_path / "riae.safetensors").config.lapped
    said = refusal(train, riae_config(digits, config.run, "train.steps=3"))
    assert "riae.lapped = False, not True" in said
    more = riae_config(digits, config.run, "train.steps=3", "riae.lapped=false")
    assert train(more)["step"] == 3


def test_a_run_of_one_kind_is_not_gone_on_with_as_the_other(
    attention_run: Path, riae_run: Path, digits: Path
) -> None:
    for config, there, here in (
        (riae_config(digits, attention_run), "attention", "lattice"),
        (attention_config(digits, riae_run, "train.precision=bfloat16"), "lattice", "attention"),
    ):
        said = refusal(train, config)
        assert str(config.run) in said
        assert f"riae.kind = '{there}', not '{here}'" in said and "another run directory" in said


def test_a_run_does_not_begin_with_weights_of_the_other_kind(
    attention_run: Path, digits: Path, tmp_path: Path
) -> None:
    said = refusal(train, riae_config(digits, tmp_path / "run", f"init_from={attention_run}"))
    assert str(attention_run) in said
    assert "riae.kind = 'attention' there and 'lattice' here" in said
    assert not (tmp_path / "run").exists()


def test_a_config_that_version_0_1_wrote_says_what_to_change(tmp_path: Path, digits: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(
        f'stage = "riae"\nrun = "{tmp_path}/run"\ndata.shards = "{digits}"\ntrain.steps = 1\n'
        'riae.pixel_width = 32\nriae.attention = "cloud"\n'
    )
    said = refusal(load_config, file)
    assert "'attention'" in said and "'lattice'" in said and "pixel_width = 32" in said
    assert load_config(file, ["riae.kind=attention"])


def test_latents_of_the_other_kind_are_refused(
    attention_run: Path, riae_run: Path, latents: Path, digits: Path, tmp_path: Path
) -> None:
    config = r2id_config(
        digits, attention_run, tmp_path / "run", f"data.latents={latents}", "train.steps=1"
    )
    said = refusal(train, config)
    assert str(latents) in said and "codec_hash" in said and "r2id encode again" in said
