"""Exported models in the place of checkpoints: an R2ID brings its RIAE, folders work like files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from r2id.checkpoints import Checkpoint, pretrained
from r2id.checkpoints.export import export
from r2id.checkpoints.trained import open_trained
from r2id.config import load_config
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.models.r2id import R2ID
from r2id.sampling.files import draw_many
from r2id.sampling.sampler import Sampler
from r2id.training.chosen_codec import choose_codec
from r2id.training.encode import encode


def draw(source: Path, codec: Codec | None = None) -> torch.Tensor:
    given = torch.tensor([3, 7]), torch.arange(2), (9, 7)
    sampler = Sampler.load(source)
    sampler = replace(sampler, codec=codec or sampler.codec)
    return sampler.sample(*given, autoguidance=1.0)


@pytest.fixture(scope="module")
def exported(riae_run: Path, r2id_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both models as files."""
    folder = tmp_path_factory.mktemp("exported")
    export(riae_run, folder / "riae.safetensors")
    assert export(r2id_run, folder / "r2id.safetensors")["codec"]
    return folder


def test_an_exported_r2id_draws_what_its_run_draws(
    exported: Path, r2id_run: Path, tmp_path: Path
) -> None:
    expected = draw(r2id_run)
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(exported / "r2id.safetensors", alone / "model.safetensors")
    for source in (exported / "r2id.safetensors", exported, alone):
        assert torch.equal(draw(source), expected)
    for dtype in ("float16", "bfloat16"):
        export(r2id_run, tmp_path / "half.safetensors", dtype=dtype, overwrite=True)
        half = draw(tmp_path / "half.safetensors")
        assert 0 < float((half - expected).abs().max()) < 0.1
    one, other = tmp_path / "one", tmp_path / "other"
    for source, out in ((r2id_run, one), (exported, other)):
        draw_many(source, out, [(8, 8)], kind="png", count=2)
    for file in sorted((one / "images").iterdir()):
        assert (other / "images" / file.name).read_bytes() == file.read_bytes()


def test_an_exported_riae_is_the_codec_that_it_was(
    exported: Path, riae_run: Path, r2id_run: Path
) -> None:
    checkpoint, codec = Codec.load(riae_run), Codec.load(exported)
    assert codec.identity == checkpoint.identity, "latents and R2IDs of the one fit the other"
    assert torch.equal(codec.mean, checkpoint.mean) and torch.equal(codec.std, checkpoint.std)
    assert (codec.image, codec.data, codec.bfloat16) == (
        checkpoint.image,
        checkpoint.data,
        checkpoint.bfloat16,
    )
    assert torch.equal(draw(r2id_run, codec), draw(r2id_run))
    config = load_config(r2id_run / "config.toml", [f"codec={exported}"])
    chosen = choose_codec(config, None)
    assert chosen is not None and chosen.identity == Checkpoint.open(riae_run).identity


def test_the_riae_of_a_half_precision_r2id_is_another_one(
    exported: Path, digits: Path, latents: Path, r2id_run: Path, tmp_path: Path
) -> None:
    """Its latents differ, so that a cache of the exact RIAE's is not taken for one of them."""
    half, folder = tmp_path / "half.safetensors", shutil.copytree(latents, tmp_path / "latents")
    export(r2id_run, half, dtype="float16")
    image = torch.rand(1, 1, 8, 8) * 2 - 1
    exact, rounded = (Codec.load(source) for source in (exported / "r2id.safetensors", half))
    assert not torch.equal(rounded.encode(image), exact.encode(image))
    found = pretrained.read(half)
    assert found.about.identity is None and found.inner and found.inner.about.identity is None
    assert encode(exported / "r2id.safetensors", digits, folder)["reused"] == 1797
    with pytest.raises(InputError, match=r"latents: holds latents of another RIAE"):
        encode(half, digits, folder)
    assert draw(half).isfinite().all()


def test_half_precision_files_that_keep_the_riaes_identity_are_read(
    riae_run: Path, r2id_run: Path, tmp_path: Path
) -> None:
    """As versions wrote them that did not tell a rounded RIAE from the exact one."""
    half = tmp_path / "half.safetensors"
    export(r2id_run, half, dtype="float16")
    expected, found = draw(half), pretrained.read(half)
    identity, inner = Checkpoint.open(riae_run).identity, found.codec()
    known = replace(inner.about, identity=identity)
    half.write_bytes(
        pretrained.pack(found.about, found.weights, (known, inner.weights), found.guide())
    )
    assert Codec.load(half).identity == identity and torch.equal(draw(half), expected)


def test_another_average_reconstructs_but_is_no_codec(
    riae_run: Path, r2id_run: Path, tmp_path: Path
) -> None:
    """Its latents were not measured."""
    found = pretrained.read(Path(export(riae_run, tmp_path / "a.safetensors")["file"]))
    about = pretrained.About(
        **{**vars(found.about), "average": "0.1", "statistics": None, "identity": None}
    )
    file = tmp_path / "b.safetensors"
    file.write_bytes(pretrained.pack(about, found.weights))
    codec = Codec.load(file)
    assert codec.identity != found.identity
    assert codec.decode(codec.encode(torch.zeros(1, 1, 8, 8)), (5, 6)).shape == (1, 1, 5, 6)
    config = load_config(r2id_run / "config.toml", [f"codec={file}"])
    with pytest.raises(InputError, match=r"codec .*b\.safetensors: .*--ema default"):
        choose_codec(config, None)


def test_a_noise_shift_that_was_applied_goes_along(r2id_run: Path, tmp_path: Path) -> None:
    export(r2id_run, tmp_path / "a.safetensors", shift_exponent=0.25)
    sampler = Sampler.load(tmp_path / "a.safetensors")
    assert sampler.diffusion.shift_exponent == 0.25
    assert Sampler.load(r2id_run).diffusion.shift_exponent == 1.0


def test_files_of_the_version_before_are_read(exported: Path, tmp_path: Path) -> None:
    """Those of an RIAE are used; those of an R2ID build it, but do not draw."""
    for name in ("riae", "r2id"):
        found = pretrained.read(exported / f"{name}.safetensors")
        about = {key: value for key, value in vars(found.about).items() if key != "identity"}
        metadata = {key: json.dumps(value) for key, value in about.items()}
        metadata |= {"format": "r2id-model", "format_version": "1"}
        digest = pretrained._digest(metadata, found.weights)
        content = pretrained.save(found.weights, metadata | {"sha256": digest})
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    codec = Codec.load(tmp_path / "riae.safetensors")
    assert torch.equal(codec.std, Codec.load(exported / "riae.safetensors").std)
    assert R2ID.from_pretrained(tmp_path / "r2id.safetensors")
    with pytest.raises(InputError, match=r"r2id\.safetensors: .*without its RIAE.*again"):
        Sampler.load(tmp_path / "r2id.safetensors")


def test_what_is_no_model_is_named(exported: Path, riae_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several exported models, r2id\S+, riae\S+"):
        open_trained(exported)  # of either stage
    with pytest.raises(InputError, match=r"riae\.safetensors: a model of stage 'riae', not 'r2id'"):
        Sampler.load(exported / "riae.safetensors")
    with pytest.raises(InputError, match="'riae', not 'r2id'"):
        Sampler.load(riae_run)
    for path, reason in ((tmp_path, "no checkpoint here"), (tmp_path / "x", "no such folder")):
        with pytest.raises(InputError, match=f"{path}: {reason}"):
            Sampler.load(path)
    (tmp_path / "mine").symlink_to(riae_run)
    with pytest.raises(InputError, match=f"{tmp_path}: .* holds one, such as {tmp_path}/mine$"):
        Sampler.load(tmp_path)
    with pytest.raises(InputError, match=r"config\.toml: "):
        Sampler.load(riae_run / "config.toml")


def test_an_exported_r2id_builds_alone(exported: Path) -> None:
    """from_pretrained gives the R2ID alone; its RIAE's and its guide's tensors are in the file."""
    own = set(R2ID.from_pretrained(exported / "r2id.safetensors").state_dict())
    stored = set(load_file(exported / "r2id.safetensors"))
    riae = set(load_file(exported / "riae.safetensors"))
    assert stored == own | {f"codec.{name}" for name in riae} | {f"guide.{name}" for name in own}


def test_exported_models_are_used_like_checkpoints(
    r2id, digits, classifier_file, riae_run, r2id_run, tmp_path
):
    for run in (riae_run, r2id_run):
        file = tmp_path / f"{run.parent.name}.safetensors"
        code, out, errors = r2id("checkpoint", "export", run, "--out", file)
        assert code == 0 and (", with its RIAE" in out) == (run == r2id_run), errors
    riae, model = (tmp_path / f"{run.parent.name}.safetensors" for run in (riae_run, r2id_run))
    pictures = []
    for number, source in enumerate((r2id_run, model, tmp_path)):
        picture = tmp_path / f"{number}.png"
        code, _, errors = r2id("sample", source, "--size", "9x7", "--count", 2, "--out", picture)
        assert code == 0, errors
        pictures.append(picture.read_bytes())
    assert pictures[0] == pictures[1] == pictures[2]
    errors_of = []
    for number, source in enumerate((riae_run, riae)):
        out_file = tmp_path / f"again-{number}.png"
        code, out, errors = r2id("reconstruct", source, picture, "--out", out_file, "--json")
        assert code == 0, errors
        errors_of.append(json.loads(out)["psnr"])
    assert errors_of[0] == errors_of[1]
    found = []
    for number, source in enumerate((r2id_run, model)):
        report = tmp_path / f"report-{number}"
        report.mkdir()
        (report / "classifier.safetensors").write_bytes(classifier_file.read_bytes())
        code, out, errors = r2id(
            "evaluate", source, "--shards", digits, "--out", report, "--count", 8, "--json"
        )
        assert code == 0, errors
        found.append(json.loads(out))
    assert found[0]["r2id"]["sizes"] == found[1]["r2id"]["sizes"]
    assert found[0]["riae"]["native"] == found[1]["riae"]["native"]
    assert found[1]["provenance"]["r2id"]["checkpoint"] == str(model)
