"""R2ID without an autoencoder: the same training, sampling, planning and evaluation on pixels."""

import json
import math
import re
import shutil

import pytest
import torch

from r2id import Pipeline, dist
from r2id.app.actions import Actions
from r2id.app.page import build
from r2id.checkpoints import Checkpoint
from r2id.checkpoints.export import export
from r2id.config import R2idRun, load_config
from r2id.errors import InputError
from r2id.evaluation.run import evaluate
from r2id.images import resize, save_png
from r2id.models.pixels import STD, Pixels
from r2id.models.r2id import R2ID
from r2id.sampling.model_card import Card, render
from r2id.sampling.model_folder import export_folder
from r2id.sampling.sampler import Sampler
from r2id.training.communication import GPUS
from r2id.training.encode import encode
from r2id.training.loop import train
from r2id.training.planner import plan
from r2id.training.tasks import make_task
from tests.conftest import CONFIGS, TINY_R2ID
from tests.data.conftest import write_set

CONFIG = CONFIGS / "mnist" / "pixel-r2id.toml"


def config_of(run, digits, *more):
    return load_config(
        CONFIG,
        [
            *TINY_R2ID,
            f"run={run}",
            f"data.shards={digits}",
            "data.size=[8, 8]",
            "data.workers=0",
            "train.precision=float32",
            "train.preview_every=1000",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    """Run directory of a small R2ID of the digits' pixels."""
    run = tmp_path_factory.mktemp("pixels") / "run"
    train(config_of(run, digits))
    return run


def test_samples_of_other_sizes(run):
    sampler = Sampler.load(run)
    assert (
        sampler.codec.identity == "pixels"
        and sampler.codec.image == (8, 8)
        and sampler.areas == (64, 64)
    )
    assert sampler.grid_for((16, 16)) == (8, 8)
    labels, seeds = torch.arange(3), torch.arange(3)
    own = sampler.latents(labels, seeds, (8, 8))  # before they are clipped
    large = sampler.sample(labels, seeds, (16, 16))
    torch.testing.assert_close(large, resize(own, (16, 16)).clamp(-1, 1))
    true = sampler.sample(labels, seeds, (16, 16), grid=(16, 16))
    assert true.shape == (3, 1, 16, 16) and not torch.allclose(true, large, atol=0.05)


def test_a_run_counts_the_grids_of_its_images(tmp_path):
    """The noise schedule belongs to the median area of all images, not of all sizes."""
    counts = {(8, 8): 70, (8, 12): 300, (10, 20): 65, (16, 16): 80}
    sizes = [size for size, count in counts.items() for _ in range(count)]
    write_set(tmp_path, {"train": sizes, "test": sizes[:1]})
    config = config_of(tmp_path / "run", tmp_path, "r2id.condition=none")
    data = config.data.model_copy(update={"size": None})
    task = make_task(config.model_copy(update={"data": data}), dist.init(), 8)
    assert task.shapes == 4 and task.facts["image"] == [8, 12]
    assert task.facts["base_side"] == 96**0.5 and task.facts["areas"] == [64, 256]
    assert task.facts["ratios"] == [0.5, 1.0]


def test_the_codec_is_the_image_itself(run):
    codec = Sampler.load(run).codec
    images = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(codec.normalise(codec.encode(images)) * STD, images)
    torch.testing.assert_close(
        codec.decode(codec.encode(images), (8, 8), (2, 1, 7, 8)), images[:, :, 2:7, 1:]
    )
    assert codec.encode(images, (4, 6)).shape == (2, 1, 4, 6)
    smooth = Pixels(3).encode(torch.ones(1, 3, 9, 5), (4, 4))
    torch.testing.assert_close(smooth, torch.ones(1, 3, 4, 4))


def test_interrupted_equals_uninterrupted(run, digits, tmp_path):
    train(config_of(tmp_path / "run", digits, "train.steps=40", "train.save_every=20"))
    folder = tmp_path / "run" / "checkpoints" / "step-00000040"
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    train(config_of(tmp_path / "run", digits))
    ours, theirs = (Checkpoint.open(path).tensors("ema") for path in (run, tmp_path / "run"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = (run / "checkpoints").stat().st_mtime_ns
    train(config_of(run, digits))
    assert (run / "checkpoints").stat().st_mtime_ns == before, "what is done is not trained again"


def test_evaluation_leaves_out_what_is_an_autoencoder_s(run, digits, classifier_file, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(classifier_file, tmp_path / "out")
    metrics = evaluate(run, digits, tmp_path / "out", count=20, invariance=2)
    assert (
        list(metrics["invariance"]) == ["r2id"] and "8x8" in metrics["invariance"]["r2id"]["sizes"]
    )
    assert "riae" not in metrics and metrics["r2id"]["sizes"]["8x8"]["samples"] == 20
    assert list(metrics["r2id"]["loss_by_grid"]["grids"]) == ["4x4", "8x8", "16x16"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    assert "RIAE" not in (tmp_path / "out" / "report.html").read_text()


def test_what_needs_an_autoencoder_is_refused(run, tmp_path, r2id):
    """Resizing would pass for upscaling, and for a reconstruction without any error."""
    picture, out = tmp_path / "in.png", tmp_path / "out.png"
    save_png(torch.zeros(1, 8, 8), picture)
    for command in ("upscale", "reconstruct"):
        code, _, errors = r2id(command, run, picture, "--size", "16x16", "--out", out)
        assert code == 2 and errors.count("\n") == 1 and not out.exists()
        assert f"{command}: this R2ID diffuses pixels: it has no autoencoder" in errors
    pipe = Pipeline.from_pretrained(run, device="cpu")
    with pytest.raises(InputError, match="upscale: this R2ID diffuses pixels"):
        pipe.upscale(picture, (16, 16))


def test_the_page_has_no_tab_for_an_autoencoder(run, r2id_run):
    gradio = pytest.importorskip("gradio")
    for source, last in ((run, "Edit"), (r2id_run, "Autoencoder")):
        page = build(Actions(Pipeline.from_pretrained(source, device="cpu")), "model")
        tabs = [block.label for block in page.blocks.values() if isinstance(block, gradio.Tab)]
        assert tabs[-1] == last


def test_a_model_card_speaks_of_no_codec(run, tmp_path):
    export_folder(run, tmp_path / "digits")
    config = json.loads((tmp_path / "digits" / "config.json").read_text())
    several = {"latent_areas": [64, 96], "latent_ratios": [0.5, 1.0]}
    published = (tmp_path / "digits" / "README.md").read_text(encoding="utf-8")
    for text in (published, render(Card("mine", config | several, [], None, []))):
        words = " ".join(text.split())
        assert not re.findall("latent|decoder|autoencoder|RIAE", words)
        assert "drawn in pixels, within the sizes that training saw, and the picture is" in words
    assert "several sizes: 64 to 96 pixels, height / width 0.5 to 1, in the median 8×8" in words


def test_a_smaller_grid_is_one_of_pixels(run, tmp_path, r2id):
    given = ["--size", "16x16", "--count", 1, "--steps", 1, "--out", tmp_path / "a.png"]
    code, _, errors = r2id("sample", run, *given)
    assert code == 0 and "16x16: drawn on 8x8 pixels instead of 16x16, because" in errors


def test_the_published_size():
    config = load_config(CONFIG)
    assert isinstance(config, R2idRun) and config.codec is None
    with torch.device("meta"):
        assert sum(p.numel() for p in R2ID(config.r2id, 1, 10).parameters()) == pytest.approx(
            6.1e6, rel=0.1
        )


def test_a_plan_takes_no_autoencoder():
    found = plan(
        CONFIG,
        ("train.batch=2", "r2id.encoder_blocks=1", "r2id.decoder_blocks=1"),
        gpus=1,
        gpu=GPUS["rtx5080"],
        share=0.5,
        classes=10,
    )
    assert (
        found["grid"] == [28, 28]
        and found["tokens"] == 784
        and found["fits"]
        and not found["memory"].get("codec")
    )


HOURGLASS = ["r2id.levels=[{width=16, blocks=1}, {width=32, blocks=1}]", "diffusion.multiscale=2"]


def test_an_hourglass_of_pixels_from_training_to_an_exported_file(digits, tmp_path):
    config = config_of(tmp_path / "run", digits, *HOURGLASS)
    first = train(config)["loss"]
    sampler = Sampler.load(tmp_path / "run")
    assert [level.width for level in sampler.model.config.levels] == [16, 32]
    labels = torch.arange(3)
    for grid in ((8, 8), (7, 5), (1, 1)):  # the last two are no multiple of a coarse cell
        drawn = sampler.sample(labels, labels, (8, 8), grid=grid, guidance=2.0)
        assert drawn.shape == (3, 1, 8, 8) and drawn.isfinite().all()
    assert math.isfinite(first)
    export(tmp_path / "run", tmp_path / "r2id.safetensors")
    model = R2ID.from_pretrained(tmp_path / "r2id.safetensors")
    x = torch.randn(1, 1, 5, 3)
    half = torch.tensor([0.5])
    assert torch.equal(model(x, half, labels[:1]), sampler.model(x, half, labels[:1]))


def test_levels_and_scales_deeper_than_the_training_images(digits, tmp_path):
    for setting, said in {
        "r2id.levels=[{width=16}, {width=16}, {width=16}, {width=16}]": "r2id.levels: 4 on .*8x8",
        "diffusion.multiscale=4": "diffusion.multiscale: 4 on .*8x8 .*at most 3",
    }.items():
        with pytest.raises(InputError, match=said):
            train(config_of(tmp_path / "run", digits, setting))
    with pytest.raises(InputError, match=r"r2id\.levels: 4 .*at most 3"):
        plan(
            CONFIG,
            (*TINY_R2ID, "data.size=[8, 8]", f"r2id.levels=[{', '.join(['{width=16}'] * 4)}]"),
            gpus=1,
            gpu=GPUS["rtx5080"],
            share=0.5,
            classes=10,
        )


def test_mistakes(run, digits, tmp_path):
    with pytest.raises(InputError, match=r"data\.latents"):
        config_of(tmp_path / "run", digits, "data.latents=somewhere")
    with pytest.raises(InputError, match=r"'r2id'.*'riae'"):
        encode(run, digits, tmp_path / "latents")
