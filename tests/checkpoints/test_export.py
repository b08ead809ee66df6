"""Checkpoints looked at and exported: one file of averaged weights that builds its model again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from r2id.checkpoints import Checkpoint, pretrained, reading
from r2id.checkpoints.export import describe, export
from r2id.config import R2idConfig, load_config
from r2id.errors import InputError
from r2id.files import step_of
from r2id.models.codec import Codec
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.pipeline import Pipeline
from r2id.sampling.sampler import Sampler
from r2id.training.loop import train
from tests.conftest import CONFIGS, TINY_RIAE

STEPS = 96


@pytest.fixture(scope="module")
def profiles_run(digits, tmp_path_factory) -> Path:
    """A small RIAE with a milestone and snapshots of averages of three widths.

    Those of 0.05 and 0.1 are to reconstruct that of 0.15, which was tracked from the first step.
    """
    run = tmp_path_factory.mktemp("profiles") / "run"
    train(
        load_config(
            CONFIGS / "digits" / "riae.toml",
            [
                *TINY_RIAE,
                f"run={run}",
                f"data.shards={digits}",
                f"train.steps={STEPS}",
                "train.ema_profiles=[0.05,0.1,0.15]",
                "train.save_every=40",
                "train.keep=1",
                "train.milestone_every=48",
            ],
        )
    )
    return run


def test_snapshots_and_milestones_of_a_run(profiles_run: Path) -> None:
    assert [step_of(path) for path in reading.list_checkpoints(profiles_run / "checkpoints")] == [
        48,
        96,
    ]
    snapshots = reading.list_checkpoints(profiles_run / "ema")
    assert [step_of(path) for path in snapshots] == list(range(3, STEPS + 1, 3))
    assert {file.name for file in snapshots[0].iterdir()} == {
        "checkpoint.json",
        "ema.safetensors",
        "ema-0.1.safetensors",
        "ema-0.15.safetensors",
    }


def test_describe(riae_run: Path, r2id_run: Path, profiles_run: Path) -> None:
    figures = describe(r2id_run)
    model = R2ID.from_pretrained(export(r2id_run, r2id_run / "described.safetensors")["file"])
    assert figures["parameters"] == sum(p.numel() for p in model.parameters())
    assert (figures["stage"], figures["step"], figures["steps"], figures["samples"]) == (
        "r2id",
        40,
        40,
        1280,
    )
    assert (
        figures["codec"] == str(riae_run)
        and figures["model"]["width"] == 32
        and figures["written_by"] == 1
    )
    assert figures["total_bytes"] == sum(
        file.stat().st_size for file in reading.find_checkpoint(r2id_run).glob("*.safetensors")
    )
    assert figures["averages"] == {"ema": figures_ema(r2id_run)} and figures["snapshots"] == 0
    figures = describe(profiles_run)
    assert (
        figures["averages"] == {"ema": 0.05, "ema-0.1": 0.1, "ema-0.15": 0.15}
        and figures["snapshots"] == 31
    )
    assert json.loads(json.dumps(figures)) == figures
    assert describe(profiles_run / "ema" / "step-00000009")["parameters"] == figures["parameters"]


def test_models_are_loaded_from_runs(riae_run: Path, r2id_run: Path, tmp_path: Path) -> None:
    export(r2id_run, tmp_path / "r2id.safetensors")
    images = torch.rand(1, 1, 9, 12) * 2 - 1
    codec = Codec.load(riae_run)
    for source in (riae_run, str(Checkpoint.open(riae_run).path), tmp_path / "r2id.safetensors"):
        riae = RIAE.from_pretrained(source)
        latents = riae.encode(images)
        assert torch.equal(latents, codec.model.encode(images)) and not riae.training
        assert riae.decode(latents, (18, 20)).shape == (1, 1, 18, 20)
    own, exported = (
        R2ID.from_pretrained(source).state_dict()
        for source in (r2id_run, tmp_path / "r2id.safetensors")
    )
    assert all(torch.equal(value, exported[name]) for name, value in own.items())
    with pytest.raises(InputError, match=r"'riae', not 'r2id': .*RIAE\.from_pretrained"):
        Pipeline.from_pretrained(riae_run)
    with pytest.raises(InputError, match=r"'r2id', not 'riae'$"):
        RIAE.from_pretrained(r2id_run)


def figures_ema(run: Path) -> float:
    return Checkpoint.open(run).meta.config["train"]["ema"]


def test_riae_in_three_lines(riae_run: Path, tmp_path: Path) -> None:
    codec = Codec.load(riae_run)
    result = export(riae_run, tmp_path / "riae.safetensors")
    assert (
        result["statistics"] and result["bytes"] == (tmp_path / "riae.safetensors").stat().st_size
    )
    model = RIAE.from_pretrained(tmp_path / "riae.safetensors")
    images = torch.rand(2, 1, 9, 12) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.encode(images), codec.model.encode(images)) and not model.training
    about = pretrained.read(tmp_path / "riae.safetensors").about
    assert about.statistics == {"mean": codec.mean.tolist(), "std": codec.std.tolist()}
    assert (about.stage, about.step, about.samples, about.average) == ("riae", 60, 1920, "default")
    assert about.config == Checkpoint.open(riae_run).meta.config


def test_r2id_in_three_lines_from_half_precision(r2id_run: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(r2id_run)
    meta = checkpoint.meta
    whole = R2ID.of(R2idConfig.model_validate(meta.config["r2id"]), meta.model)
    checkpoint.load_ema(whole.eval())
    for dtype, error in (("float16", 1e-3), ("bfloat16", 1e-2)):
        file = tmp_path / f"{dtype}.safetensors"
        export(r2id_run, file, dtype=dtype)
        with safe_open(file, framework="pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {  # noqa: SIM118
                {"float16": "F16", "bfloat16": "BF16"}[dtype]
            }
        model = R2ID.from_pretrained(file)
        for (name, half), exact in zip(model.named_parameters(), whole.parameters(), strict=True):
            assert half.dtype == torch.float32, name
            torch.testing.assert_close(
                half.detach(), exact.detach().to(getattr(torch, dtype)).float(), rtol=0, atol=0
            )
        x, labels = torch.randn(2, model.channels, 2, 3), torch.tensor([3, -1])
        with torch.no_grad():
            found, expected = (net(x, torch.full((2,), 0.5), labels) for net in (model, whole))
        assert float((found - expected).abs().max()) < error * max(1.0, float(expected.abs().max()))
    assert (tmp_path / "float16.safetensors").stat().st_size < 0.6 * export(
        r2id_run, tmp_path / "f.safetensors"
    )["bytes"]


def test_values_beyond_half_precision_are_refused(tmp_path: Path, riae_run: Path) -> None:
    from r2id.checkpoints.files import write_description, write_part
    from r2id.checkpoints.state import whole

    folder = tmp_path / "step-00000060"
    folder.mkdir()
    weights = Checkpoint.open(riae_run).tensors("ema")
    name = min(weights)
    weights[name] = torch.full_like(weights[name], 1e5)
    write_description(
        folder, Checkpoint.open(riae_run).meta, write_part(folder, "ema", whole(weights), 0, 1)
    )
    with pytest.raises(InputError, match=f"float16: {name} "):
        export(folder, tmp_path / "half.safetensors", dtype="float16")
    assert not (tmp_path / "half.safetensors").exists()
    export(folder, tmp_path / "half.safetensors", dtype="bfloat16")


def test_any_width_is_reconstructed(profiles_run: Path, tmp_path: Path) -> None:
    """Of the widths 0.05 and 0.1 the one of 0.15, which this run has tracked beside them."""
    exact, last = (Checkpoint.open(profiles_run).tensors(kind) for kind in ("ema-0.15", "model"))
    two = two_of(profiles_run, tmp_path / "two")
    result = export(two, tmp_path / "made.safetensors", sigma=0.15)
    assert result["snapshots"] == 2 * 32 and result["misfit"] < 0.05 and not result["statistics"]
    made = pretrained.read(tmp_path / "made.safetensors").weights
    nearest = Checkpoint.open(profiles_run).tensors("ema-0.1")

    def error(weights: dict[str, torch.Tensor]) -> float:
        """Relative to how far the average is from the last weights."""
        flat = [
            torch.cat([part[name].flatten() for name in exact]) for part in (weights, exact, last)
        ]
        return float((flat[0] - flat[1]).norm() / (flat[2] - flat[1]).norm())

    assert error(made) < 0.01 and error(made) < error(nearest) / 20
    assert pretrained.read(tmp_path / "made.safetensors").about.average == "0.15"
    milestone = export(
        two / "checkpoints" / "step-00000048", tmp_path / "early.safetensors", sigma=0.15
    )
    assert milestone["snapshots"] == 2 * 16, "what came after it does not count"


def test_only_the_weights_that_were_trained_keep_the_identity(
    profiles_run: Path, tmp_path: Path
) -> None:
    """Rounded ones and another average are other models, and so take no latents of that one."""
    file, identity = tmp_path / "a.safetensors", Checkpoint.open(profiles_run).identity
    for settings, kept in (
        ({}, identity),
        ({"dtype": "float16"}, None),
        ({"dtype": "bfloat16"}, None),
        ({"sigma": 0.1}, None),
    ):
        export(profiles_run, file, overwrite=True, **settings)
        found = pretrained.read(file)
        assert found.about.identity == kept, settings
        assert (found.identity == identity) == (kept is not None)


def two_of(run: Path, out: Path) -> Path:
    """The run as it would be with the widths 0.05 and 0.1 alone."""
    from r2id.checkpoints.files import write_description

    for folder in (
        *reading.list_checkpoints(run / "checkpoints"),
        *reading.list_checkpoints(run / "ema"),
    ):
        opened, copy = Checkpoint(folder), out / folder.relative_to(run)
        copy.mkdir(parents=True)
        files = {
            name: fact for name, fact in opened.files.items() if name != "ema-0.15.safetensors"
        }
        for name in files:
            (copy / name).write_bytes((folder / name).read_bytes())
        meta = opened.meta.model_copy(update={"config": json.loads(json.dumps(opened.meta.config))})
        meta.config["train"]["ema_profiles"] = [0.05, 0.1]
        write_description(copy, meta, files)
    return out


def test_a_tracked_width_comes_out_as_it_was_tracked(profiles_run: Path, tmp_path: Path) -> None:
    assert export(profiles_run, tmp_path / "a.safetensors", sigma=0.1)["misfit"] < 1e-5
    made = pretrained.read(tmp_path / "a.safetensors").weights
    torch.testing.assert_close(
        made, Checkpoint.open(profiles_run).tensors("ema-0.1"), rtol=1e-5, atol=1e-6
    )


def test_a_damaged_snapshot_is_named(profiles_run: Path, tmp_path: Path) -> None:
    two = two_of(profiles_run, tmp_path / "two")
    file = two / "ema" / "step-00000042" / "ema.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=rf"{file}: .*{file.parent} "):
        export(two, tmp_path / "made.safetensors", sigma=0.15)


def test_any_flipped_byte_of_an_exported_file_is_noticed(riae_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "riae.safetensors"
    export(riae_run, file, dtype="bfloat16")
    intact, draw = file.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(intact[:8], "little")
    text = intact[:header].rstrip(b" ")  # the padding behind says nothing
    places = [draw.randrange(len(text)) for _ in range(60)] + [
        draw.randrange(header, len(intact)) for _ in range(20)
    ]
    for place in places:
        data = bytearray(intact)
        data[place] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with pytest.raises(InputError, match=str(file)) as caught:
            RIAE.from_pretrained(file)
        assert "\n" not in str(caught.value)
    file.write_bytes(intact[:-1])
    with pytest.raises(InputError, match=str(file)):
        RIAE.from_pretrained(file)


def test_files_that_are_none(riae_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "riae.safetensors"
    export(riae_run, file)
    for path in (tmp_path / "no.safetensors", riae_run / "config.toml"):
        with pytest.raises(InputError, match=str(path)):
            RIAE.from_pretrained(path)
    with pytest.raises(InputError, match="'riae', not 'r2id'"):
        R2ID.from_pretrained(file)
    found = pretrained.read(file)
    about = pretrained.About(**{**vars(found.about), "config": {"riae": {"wide": 3}, "seed": 0}})
    file.write_bytes(pretrained.pack(about, found.weights))
    with pytest.raises(InputError, match=r"config of riae .*wide"):
        RIAE.from_pretrained(file)
    about = pretrained.About(**{**vars(found.about), "facts": {"channels": 3}})
    file.write_bytes(pretrained.pack(about, found.weights))
    with pytest.raises(InputError, match=str(file)):
        RIAE.from_pretrained(file)
    save_file(found.weights, file)
    with pytest.raises(InputError, match=f"{file}: .*r2id-model"):
        RIAE.from_pretrained(file)
    save_file(found.weights, file, {"format": "r2id-model", "format_version": "9"})
    with pytest.raises(InputError, match=r"format_version 9.*1"):
        RIAE.from_pretrained(file)


@pytest.mark.parametrize("section", ["riae", "data", "r2id", "diffusion", "sample"])
def test_a_config_of_another_version_is_one_line_wherever_a_model_is_used(
    riae_run: Path, r2id_run: Path, section: str
) -> None:
    run, load = (riae_run, Codec.load) if section in ("riae", "data") else (r2id_run, Sampler.load)
    checkpoint = Checkpoint.open(run)
    checkpoint.meta.config[section]["unknown"] = 3
    with pytest.raises(InputError, match=f"config of {section} is not .*unknown") as caught:
        load(checkpoint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (0.1, r"0\.1: .*train\.ema_profiles"),
        (0.5, r"0\.5: .*0\.28"),
        (float("nan"), r"nan: .*0\.28"),
    ],
)
def test_widths_that_cannot_be_had(
    sigma: float, message: str, riae_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        export(riae_run, tmp_path / "a.safetensors", sigma=sigma)


def test_nothing_is_replaced_unless_asked(riae_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_text("precious")
    with pytest.raises(InputError, match=str(file)):
        export(riae_run, file)
    assert file.read_text() == "precious"
    export(riae_run, file, overwrite=True)
    assert RIAE.from_pretrained(file)
    with pytest.raises(InputError, match=r"a\.pt: .*\.safetensors"):
        export(riae_run, tmp_path / "a.pt")


def test_profiles_may_not_change_in_a_run(profiles_run: Path) -> None:
    config = load_config(
        profiles_run / "config.toml", ["train.steps=99", "train.ema_profiles=[0.05]"]
    )
    with pytest.raises(
        InputError, match=r"train\.ema_profiles = \[0\.05, 0\.1, 0\.15\], not \[0\.05\]"
    ):
        train(config)


def test_a_guide_is_kept_from_the_beginning_or_not_at_all(r2id_run: Path) -> None:
    config = load_config(r2id_run / "config.toml", ["train.steps=99", "train.guide_after=0.5"])
    with pytest.raises(InputError, match=r"train\.guide_after = 0\.25, not 0\.5"):
        train(config)
