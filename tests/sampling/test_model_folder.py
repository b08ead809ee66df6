"""Models as folders to publish: complete or absent, readable by the hub, with examples that run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from r2id import Pipeline
from r2id.checkpoints import Checkpoint, pretrained
from r2id.checkpoints.export import export
from r2id.errors import InputError, WorkError
from r2id.evaluation.run import evaluate
from r2id.files import atomic_folder, write_json
from r2id.sampling.model_card import Card, _command, render
from r2id.sampling.model_folder import _config, _Model, export_folder
from r2id.sampling.reconstruction import reconstruct_file
from r2id.sampling.sampler import Sampler
from tests.test_pipeline_arguments import with_condition

FILES = {"README.md", "config.json", "model.safetensors", "pictures"}


@pytest.fixture(scope="module")
def report(digits, r2id_run, classifier_file, tmp_path_factory) -> Path:
    """A report of the small R2ID."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copy(classifier_file, folder)
    chosen = {"solver": "ddim", "eta": 0.5, "guidance_interval": (0.1, 0.9)}
    evaluate(r2id_run, digits, folder, sizes=((8, 8), (12, 8)), count=16, seed=5, **chosen)
    return folder


@pytest.fixture(scope="module")
def published(r2id_run: Path, report: Path, tmp_path_factory) -> Path:
    """The small R2ID as a folder."""
    folder = tmp_path_factory.mktemp("published") / "digits"
    done = export_folder(r2id_run, folder, licence="mit", report=report)
    assert done["report"] and done["codec"]
    return folder


def draw(source: Path) -> torch.Tensor:
    return Sampler.load(source).sample(torch.tensor([3, 7]), torch.arange(2), (9, 7))


def blocks(folder: Path, language: str) -> list[str]:
    return blocks_of((folder / "README.md").read_text(encoding="utf-8"), language)


def blocks_of(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def run_in(folder: Path, *words: str) -> None:
    """Run a program as somebody who is in a folder with the model's folder in it."""
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_folder_stands_for_both_models(published, r2id_run, riae_run, tmp_path):
    assert {path.name for path in published.iterdir()} == FILES
    assert torch.equal(draw(published), draw(r2id_run))
    Image.effect_noise((9, 12), 50).save(tmp_path / "picture.png")
    psnrs = [
        reconstruct_file(source, tmp_path / "picture.png", tmp_path / f"{number}.png", ())["psnr"]
        for number, source in enumerate((published, riae_run))
    ]
    assert psnrs[0] == psnrs[1]
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_config_json(published, r2id_run):
    config = json.loads((published / "config.json").read_text())
    sampler = Sampler.load(r2id_run)
    file = pretrained.read(published / "model.safetensors")
    assert (config["format"], config["format_version"], file.version) == ("r2id-model", "3", "3")
    assert config["license"] == "mit"
    assert config["parameters"] == {
        "r2id": sum(p.numel() for p in sampler.model.parameters()),
        "riae": sum(p.numel() for p in sampler.codec.model.parameters()),
    }
    assert (config["image_size"], config["classes"], config["step"]) == ([8, 8], 10, 40)
    assert (config["condition"], config["embedding_shape"]) == ("class", None)
    assert (config["latent_areas"], config["latent_ratios"]) == ([16, 16], [1.0, 1.0])
    assert config["codec"]["step"] == 60
    assert config["config"]["r2id"] == Checkpoint.open(r2id_run).meta.config["r2id"]


def test_the_card_says_of_which_sizes_training_images_were(published):
    config = json.loads((published / "config.json").read_text())
    several = {"image_size": [52, 43], "latent_areas": [32, 42], "latent_ratios": [0.5, 7 / 6]}
    expected = {
        "Trained on images of 8×8 pixels, with 10 classes": {},
        "Trained on images of several sizes: 32 to 42 latent cells of 2×2 pixels, height / width "
        "0.5 to 1.17, in the median 52×43 pixels, with 10 classes": several,
        "Trained on images of 8×8 pixels in the median. Sizes": {
            "stage": "riae",
            "latent_areas": None,
            "latent_ratios": None,
        },
    }
    for words, changes in expected.items():
        card = Card("mine", config | changes, [], None, [])
        assert words in " ".join(render(card).split()), words


def test_nobody_learns_where_files_were(published, r2id_run, tmp_path):
    """Absolute paths are in the run's config, because the tests' data lies in temporary folders."""
    root = str(r2id_run.parents[2]).encode()
    export(r2id_run, tmp_path / "one.safetensors")
    assert root in (tmp_path / "one.safetensors").read_bytes()
    for file in published.rglob("*"):
        assert file.is_dir() or root not in file.read_bytes(), file


def test_the_card_is_one_of_the_hub(published):
    cards = pytest.importorskip("huggingface_hub")
    card = cards.ModelCard.load(published / "README.md")
    assert card.data.license == "mit" and card.data.library_name == "r2id"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "diffusion" in card.data.tags
    assert "`mit`" in card.text.rpartition("## Licence")[2]
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text):
        with Image.open(published / picture) as opened:
            opened.load()
            assert min(opened.size) > 100, picture
    shown = set(re.findall(r"\]\(pictures/([^)]+)\)", card.text))
    assert shown == {path.name for path in (published / "pictures").iterdir()}


def test_figures_are_the_report_s_with_the_command_that_measures_them(
    published, report, digits, tmp_path
):
    metrics = json.loads((report / "metrics.json").read_text())
    text = (published / "README.md").read_text(encoding="utf-8")
    for size, row in metrics["r2id"]["sizes"].items():
        line = next(
            line for line in text.splitlines() if f"samples, {size.replace('x', '×')}" in line
        )
        assert f"class accuracy {row['accuracy']:.3f}" in line
        assert f"Fréchet distance {row['frechet']:.3g}" in line
    assert f"PSNR {metrics['riae']['native']['psnr']:.2f} dB" in text
    assert f"on {metrics['provenance']['software']['date']}" in text
    assert metrics["provenance"]["data"]["digest"][:12] in text
    command = next(block for block in blocks(published, "bash") if "evaluate" in block)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits").symlink_to(digits)
    (tmp_path / "digits").symlink_to(published)
    (tmp_path / "report").mkdir()
    shutil.copy(report / "classifier.safetensors", tmp_path / "report")
    run_in(tmp_path, "bash", "-c", f'r2id() {{ {sys.executable} -m r2id.cli "$@"; }}\n{command}')
    again = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert again["r2id"]["sizes"] == metrics["r2id"]["sizes"] and again["riae"] == metrics["riae"]


def test_the_command_names_a_split_that_is_not_the_model_s_own():
    card = SimpleNamespace(name="me/x", config={"config": {"data": {"test_split": "test"}}})
    for split, named in (("val", True), ("test", False)):
        words = _command(card, {"provenance": {"data": {"dataset": "x", "split": split}}})
        assert (words[5:7] == ["--split", "val"]) == named


def test_the_shell_s_example_runs_as_printed(published):
    command = next(block for block in blocks(published, "bash") if "sample" in block)
    run_in(
        published.parent,
        "bash",
        "-c",
        f'r2id() {{ {sys.executable} -m r2id.cli "$@"; }}\n{command}',
    )
    with Image.open(published.parent / "samples.png") as picture:
        assert picture.size == (2 * (32 + 2), 48 + 2)


def test_the_python_example_runs_as_printed(published):
    (example,) = blocks(published, "python")
    run_in(published.parent, sys.executable, "-c", example)
    with Image.open(published.parent / "sample.png") as picture:
        assert picture.size == (32, 48)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        (
            {"condition": "attributes", "attributes": ("Bushy brows", "Male")},
            ['pipe(attributes=["Bushy brows"], size', "`-Bushy brows`"],
        ),
        (
            {"condition": "embedding", "shape": (3, 4)},
            [
                "with embeddings of shape [3, 4].",
                "two embeddings in `embeddings.npy`, floats of shape [2, 3, 4], in Python",
            ],
        ),
    ],
)
def test_examples_of_attributes_and_embeddings(
    pipe, published, condition, expected, tmp_path, monkeypatch, r2id
):
    """They run as printed, and give the condition; pictures of the card have none."""
    told = with_condition(pipe, **condition)
    file = pretrained.read(published / "model.safetensors")
    config = _config(_Model(file, told.codec, told.sampler), {"dtype": "float32"}, None)
    text = render(Card("mine", config, [(8, 8)], None, []))
    words = " ".join(text.split())
    assert not [part for part in expected if part not in words], text
    assert "Seeds from 0 on, drawn without a condition; " in words
    monkeypatch.setattr(Pipeline, "from_pretrained", lambda name: told)
    monkeypatch.setattr(Sampler, "load", lambda *_: told.sampler)
    monkeypatch.chdir(tmp_path)
    given = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float16)
    np.save("embeddings.npy", given)
    (example,) = blocks_of(text, "python")
    exec(example, {})
    (command,) = blocks_of(text, "bash")
    code, _, errors = r2id(*shlex.split(command)[1:])
    assert code == 0, errors
    kind = condition["condition"]
    wanted = {"attributes": ["Bushy brows"]} if kind == "attributes" else {"embeddings": given}
    drawn = told(**wanted, size=(48, 32), seeds=[0, 1])
    with Image.open("sample.png") as first, Image.open("samples.png") as both:
        assert np.array_equal(first, drawn[0])
        for number, picture in enumerate(drawn):
            left = number * (32 + 2)
            assert np.array_equal(both.crop((left, 0, left + 32, 48)), picture)


def test_an_riae_alone(riae_run, report, tmp_path):
    """Its figures are those of the report of an R2ID with it; its examples run, too."""
    done = export_folder(riae_run, tmp_path / "riae", report=report)
    assert done["report"] and not (tmp_path / "riae" / "pictures").exists()
    text = (tmp_path / "riae" / "README.md").read_text(encoding="utf-8")
    assert "license_name: unspecified" in text and "has chosen none" in text
    assert "PSNR" in text and "samples, " not in text
    Image.effect_noise((9, 12), 50).save(tmp_path / "picture.png")
    (example,) = blocks(tmp_path / "riae", "python")
    run_in(tmp_path, sys.executable, "-c", example)
    with Image.open(tmp_path / "decoded.png") as picture:
        assert picture.size == (32, 48)


def test_figures_of_another_model_are_not_shown(r2id_run, riae_run, report, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(report, other)
    metrics = json.loads((other / "metrics.json").read_text())
    metrics["provenance"]["r2id"]["identity"] = "0" * 64
    write_json(other / "metrics.json", metrics)
    with pytest.raises(InputError, match=rf"--report {other}.*another model"):
        export_folder(r2id_run, tmp_path / "a", report=other)
    run = tmp_path / "run"
    shutil.copytree(r2id_run, run)
    other.rename(tmp_path / "report")
    assert not export_folder(run, tmp_path / "a")["report"]
    assert "another model" in capsys.readouterr().err
    text = (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert "without a report" in text and "class accuracy" not in text
    (tmp_path / "report" / "metrics.json").write_text('{"format_version": 3}')
    with pytest.raises(InputError, match="not the metrics"):
        export_folder(run, tmp_path / "b", report=tmp_path / "report")
    with pytest.raises(InputError, match=r"none.*No such file"):
        export_folder(run, tmp_path / "b", report=tmp_path / "none")
    assert not (tmp_path / "b").exists()


def test_what_is_there_is_replaced_only_if_asked_and_only_an_export(r2id, r2id_run, tmp_path):
    out = tmp_path / "out"
    code, _, errors = r2id("checkpoint", "export", r2id_run, "--out", out, "--dtype", "bfloat16")
    assert code == 0, errors
    before = (out / "model.safetensors").read_bytes()
    code, _, errors = r2id("checkpoint", "export", r2id_run, "--out", out)
    assert code == 2 and f"--out {out}: exists already" in errors
    (out / "notes.txt").write_text("mine")
    code, _, errors = r2id("checkpoint", "export", r2id_run, "--out", out, "--overwrite")
    assert (
        code == 2 and "notes.txt" in errors and (out / "model.safetensors").read_bytes() == before
    )
    (out / "notes.txt").unlink()
    code, text, errors = r2id("checkpoint", "export", r2id_run, "--out", out, "--overwrite")
    assert code == 0 and "without a report" in text, errors
    assert (out / "model.safetensors").read_bytes() != before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--license", "My Own"), "--license 'My Own': must be"),
        (("--report", "nowhere"), "nowhere/metrics.json: cannot be read"),
        (("--ema", "0.1"), "--ema 0.1: "),
    ],
)
def test_mistakes_leave_nothing(r2id, r2id_run, tmp_path, options, message):
    code, _, errors = r2id("checkpoint", "export", r2id_run, "--out", tmp_path / "o", *options)
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_options_of_a_folder_are_refused_for_a_file(r2id, r2id_run, tmp_path):
    file = tmp_path / "o.safetensors"
    code, _, errors = r2id("checkpoint", "export", r2id_run, "--out", file, "--license", "mit")
    assert code == 2 and "--license mit: goes with a folder" in errors and not file.exists()


def test_a_folder_is_complete_or_absent(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyError), atomic_folder(out) as folder:
        (folder / "half").touch()
        raise KeyError
    assert not any(tmp_path.iterdir())
    with atomic_folder(out) as folder:
        (folder / "whole").touch()
        assert not out.exists()
        with pytest.raises(WorkError, match="another process"), atomic_folder(out):
            pass
    with pytest.raises(WorkError, match=f"{out}: cannot be written"), atomic_folder(out) as folder:
        raise OSError(28, "No space left on device")
    assert [path.name for path in out.iterdir()] == ["whole"]
    killed = tmp_path / ".out.new"
    (killed / "inner").mkdir(parents=True)
    (killed / "rest").touch()
    with atomic_folder(out) as folder:
        (folder / "next").touch()
    assert [path.name for path in out.iterdir()] == ["next"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_weights_of_a_folder_are_an_exported_file(published, r2id_run, tmp_path):
    found = pretrained.read(published / "model.safetensors")
    assert found.identity == Checkpoint.open(r2id_run).identity
    assert found.inner is not None and found.about.config["data"]["shards"] == "shards"
