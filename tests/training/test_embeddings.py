"""R2ID told the embeddings of texts: trained, sampled, exported, evaluated."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.prepare import prepare
from r2id import cli, dist
from r2id.checkpoints import Checkpoint
from r2id.checkpoints.export import export
from r2id.config import DataConfig, PrepareConfig, load_config
from r2id.data.latents import LatentCache, latent_loader
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation import self_supervised
from r2id.evaluation.errors_by_noise import loss_at
from r2id.evaluation.r2id import Samples, draw_samples
from r2id.images import encode_png, save_png, tile
from r2id.models.conditioning import drop, empty
from r2id.models.r2id import R2ID
from r2id.sampling.conditions import draw_conditions
from r2id.sampling.sampler import Sampler
from r2id.training.callbacks.previews import _samples
from r2id.training.communication import GPUS
from r2id.training.encode import encode
from r2id.training.loop import train
from r2id.training.planner import plan
from r2id.training.tasks import make_task
from tests.conftest import CONFIGS, TINY_R2ID

SHAPE, IMAGES, STEPS = (3, 8), 400, 150
PIXELS, LATENTS = CONFIGS / "mnist" / "pixel-r2id.toml", CONFIGS / "digits" / "r2id.toml"
FEW = [
    *TINY_R2ID,
    "data.workers=0",
    "train.precision=float32",
    "train.preview_every=1000",
    "r2id.condition=embedding",
]


def text_of(label, shape=SHAPE):
    """The embedding of a class's text."""
    return np.random.default_rng(label).normal(size=shape).astype(np.float32)


def prepared(folder, images, shape):
    """Shards of digits that have no class, but the embedding of one, with noise."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    noise = np.random.default_rng(0)
    (folder / "in").mkdir(parents=True)
    for number in range(images):
        Image.fromarray((pixels[number].reshape(8, 8) * 15.9).astype(np.uint8)).save(
            folder / f"in/{number}.png"
        )
        np.save(
            folder / f"in/{number}.npy",
            text_of(labels[number], shape) + 0.1 * noise.normal(size=shape),
        )
    return prepare(PrepareConfig(dataset="folder", source=folder / "in", out=folder / "shards"))


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("told"), IMAGES, SHAPE)


@pytest.fixture(scope="module")
def run(told, tmp_path_factory):
    """Run directory of a small R2ID of the digits' pixels, trained with embeddings."""
    run = tmp_path_factory.mktemp("run") / "run"
    train(
        load_config(
            PIXELS,
            [
                *FEW,
                f"run={run}",
                f"data.shards={told}",
                "data.size=[8, 8]",
                f"train.steps={STEPS}",
                "optim.lr=3e-3",
                "train.ema=0.98",
                "r2id.dropout=0.0",
            ],
        )
    )
    return run


@pytest.fixture
def command(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["r2id", *map(str, arguments)])
        code, _ = 0, capfd.readouterr()  # of what was trained for the test
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, *capfd.readouterr()

    return call


def test_the_loss_is_lower_told_the_right_embedding(run, told):
    sampler, shards = Sampler.load(run), ShardSet.open(told, embeddings=True)
    losses = torch.zeros(3)
    for batch in eval_loader(shards, DataConfig(shards=told), "train", 100):
        latents, right = sampler.codec.encode(batch["image"]), batch["embedding"]
        for number, condition in enumerate((right, right.roll(1, 0), empty(right))):
            losses[number] += sum(
                loss_at(sampler, latents, condition, time, 7).sum() for time in (0.5, 0.7, 0.9)
            )
    assert losses[0] < 0.93 * losses[1] and losses[0] < 0.97 * losses[2], losses


def test_none_is_all_zeros_and_learned(run):
    sampler = Sampler.load(run)
    x, half = torch.randn(2, sampler.codec.latent_channels, 8, 8), torch.full((2,), 0.5)
    texts = torch.from_numpy(np.stack([text_of(0), text_of(1)])).half()
    none = drop(texts, torch.tensor([True, False]))
    assert none[0].eq(0).all() and torch.equal(none[1], texts[1])
    with torch.no_grad():
        given, dropped = sampler.model(x, half, texts), sampler.model(x, half, none)
        assert torch.equal(given[1], dropped[1]) and not torch.allclose(
            given[0], dropped[0], atol=1e-3
        )
        tokens = sampler.model.condition(none)
    assert tokens.shape == (2, 3, 32) and tokens[0].abs().amax(1).min() > 1e-3, (
        "of each token a vector of its own"
    )
    assert sampler.num_classes == 0 and torch.equal(
        sampler.sample(torch.tensor([-1]), torch.tensor([3]), (8, 8)),
        sampler.sample(torch.zeros(1, *SHAPE), torch.tensor([3]), (8, 8)),
    ), "where no text is told"


def test_samples_of_one_text_and_of_several_in_turn(run, command, tmp_path):
    texts = np.stack([text_of(label) for label in range(3)])
    np.save(tmp_path / "one.npy", texts[0])
    np.save(tmp_path / "three.npy", texts)
    sampler, drawn = Sampler.load(run), {}
    for name in ("one", "three"):
        code, out, errors = command(
            "sample",
            run,
            "--embedding",
            tmp_path / f"{name}.npy",
            "--size",
            "8x8",
            "--size",
            "12x9",
            "--count",
            5,
            "--seed",
            2,
            "--steps",
            3,
            "--out",
            tmp_path / name,
            "--json",
        )
        assert code == 0, errors
        assert json.loads(out)["seeds"] == [2, 3, 4, 5, 6] and len(json.loads(out)["files"]) == 2
        drawn[name] = (tmp_path / name / "12x9.png").read_bytes()
    for name, labels in (("one", [0] * 5), ("three", [0, 1, 2, 0, 1])):
        wanted = sampler.sample(
            torch.from_numpy(texts[labels]).half(), torch.arange(2, 7), (12, 9), steps=3
        )
        assert drawn[name] == save_png(tile(wanted, 5), tmp_path / "wanted.png").read_bytes()
    assert drawn["one"] != drawn["three"]


def test_files_of_samples_of_several_texts_go_on(run, command, tmp_path):
    """A folder holds the samples of one file of embeddings, wherever it was interrupted."""
    texts = np.stack([text_of(label) for label in range(3)])
    np.save(tmp_path / "three.npy", texts)
    np.save(tmp_path / "one.npy", texts[0])
    (tmp_path / "copy.npy").write_bytes((tmp_path / "three.npy").read_bytes())

    def draw(name, *options):
        out = ("--out", tmp_path / "drawn", "--format", "png", "--size", "8x8", "--count", 5)
        return command("sample", run, "--embedding", tmp_path / f"{name}.npy", *out, *options)

    code, _, errors = draw("three")
    assert code == 0, errors
    images = sorted((tmp_path / "drawn" / "images").iterdir())
    before = [image.read_bytes() for image in images]
    images[3].unlink()
    code, _, errors = draw("copy")
    assert code == 0 and [image.read_bytes() for image in images] == before, errors
    code, _, errors = draw("one")
    assert code == 2 and "embedding_sha256" in errors
    drawn = Sampler.load(run).sample(
        torch.from_numpy(texts[[0, 1, 2, 0, 1]]).half(), torch.arange(5), (8, 8)
    )
    assert before == [encode_png(image) for image in drawn]


@pytest.mark.parametrize(
    ("model", "content", "more", "words"),
    [
        ("run", np.zeros((2, 8)), "", ["[2, 8]", "[3, 8]", "[N, 3, 8]"]),
        ("run", np.full(SHAPE, np.nan), "", ["x.npy", "finite"]),
        ("run", np.zeros(SHAPE, int), "", ["int64"]),
        ("run", None, "", ["x.npy"]),
        ("run", np.full(SHAPE, np.nan), "--format png --size 8x8", ["x.npy", "finite"]),
        ("run", np.zeros(SHAPE), "--label 1", ["label 1"]),
        ("run", np.zeros(SHAPE), "--attribute Male", ["--attribute", "--embedding"]),
        ("r2id_run", np.zeros(SHAPE), "", ["x.npy", "embeddings"]),
    ],
)
def test_a_mistake_is_one_line(model, content, more, words, request, command, tmp_path):
    if content is not None:
        np.save(tmp_path / "x.npy", content)
    code, out, errors = command(
        "sample",
        request.getfixturevalue(model),
        "--embedding",
        tmp_path / "x.npy",
        "--count",
        1,
        *more.split(),
        "--out",
        tmp_path / "out",
    )
    assert (
        code == 2
        and out == ""
        and errors.count("\n") == 1
        and all(word in errors for word in words)
    ), errors
    assert not (tmp_path / "out").exists()


def test_a_set_without_embeddings(digits, tmp_path):
    overrides = (*FEW, f"run={tmp_path / 'run'}", f"data.shards={digits}", "data.size=[8, 8]")
    with pytest.raises(InputError, match=r"r2id\.condition.*'embedding'"):
        train(load_config(PIXELS, overrides))
    for shards, named in ((digits, r"r2id\.condition"), (tmp_path / "none", r"data\.shards.*none")):
        with pytest.raises(InputError, match=named):
            plan(PIXELS, (*overrides, f"data.shards={shards}"), gpus=1, gpu=GPUS["a100"], share=0.4)


def test_the_plan_counts_the_model_that_is_trained(run):
    model = Sampler.load(run).model
    found = plan(run / "config.toml", (), gpus=1, gpu=GPUS["a100"], share=0.4)
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) and found["fits"]


def test_exported(run, tmp_path):
    file = export(run, tmp_path / "model.safetensors")["file"]
    model, sampler = R2ID.from_pretrained(file), Sampler.load(run)
    x, half = torch.randn(1, sampler.codec.latent_channels, 6, 5), torch.tensor([0.5])
    text = torch.from_numpy(text_of(4)).unsqueeze(0)
    with torch.no_grad():
        assert (
            torch.equal(model(x, half, text), sampler.model(x, half, text))
            and model.condition_shape == SHAPE
        )


def test_evaluated(run, told, digits, classifier_file, command, tmp_path, monkeypatch):
    """Under the embeddings of test images, or without: there is no class to judge by."""
    monkeypatch.setattr(self_supervised, "_SEEN", 3 * 128)

    def evaluated(shards, *options):
        options = ("--shards", shards, "--out", tmp_path / "report", "--count", 4, *options)
        code, _, errors = command("evaluate", run, *options)
        return code, errors

    scales = ("--guidance", 1, "--guidance", 4)
    code, errors = evaluated(digits, *scales)
    assert code == 2 and re.search("guidance 1, 4: .* nothing that samples could be", errors)
    assert not (tmp_path / "report").exists()
    (tmp_path / "report").mkdir()
    shutil.copy(classifier_file, tmp_path / "report")
    for shards, options in ((told, scales), (digits, ())):
        code, errors = evaluated(shards, *options)
        assert code == 0, errors
        metrics = json.loads((tmp_path / "report/metrics.json").read_text())
        given = list(metrics["r2id"]["loss_by_time"]["loss"]), metrics["r2id"]["condition"]
        if shards == told:
            names = ["its embedding", "no embedding", "another image's embedding"]
            assert given == (names, "embedding")
            assert "(4 samples under embeddings of test images)" in metrics["headlines"][0]
            one, other = metrics["guidance"]["scales"]
            assert one["frechet"] != other["frechet"]
        else:
            assert given == (["no class"], "none")
            assert "has no embedding: samples are drawn without a condition" in errors


def test_each_sample_has_the_embedding_of_a_test_image(run, told):
    sampler, shards = Sampler.load(run), ShardSet.open(told, embeddings=True)
    test = torch.from_numpy(shards.split("test").embedding)
    given = draw_conditions(sampler, shards, "test", 5, seed=3)
    rows = (given.flatten(1)[:, None] == test.flatten(1)).all(2).int().argmax(1)
    assert len(set(rows.tolist())) == 5 and torch.equal(test[rows], given)
    assert torch.equal(draw_conditions(sampler, shards, "test", 3, seed=3), given[:3])
    assert not torch.equal(draw_conditions(sampler, shards, "test", 5, seed=4), given)
    everything = draw_conditions(sampler, shards, "test", 10_000, seed=3)
    assert len(everything) == len(test)
    samples = Samples(sampler, 7, 3, given)
    assert torch.equal(samples.conditions, given[[0, 1, 2, 3, 4, 0, 1]])
    drawn = draw_samples(samples, [(8, 8)])[8, 8]
    alone = sampler.sample(given[4:], torch.tensor([7]), (8, 8))
    torch.testing.assert_close(drawn[4:5], alone)
    assert torch.equal(draw_samples(samples.first(5), [(8, 8)])[8, 8], drawn[:5])


def test_previews_are_told_embeddings_of_test_images(run, told):
    task = make_task(load_config(run / "config.toml", ["sample.steps=2"]), dist.init(), 8)
    model = R2ID.from_pretrained(run)
    sampler = Sampler.load(run)
    drawn = _samples(task, model, None)[0].picture[:, :8, :8]
    given = draw_conditions(sampler, ShardSet.open(told, embeddings=True), "test", 1, seed=0)
    for condition, same in ((given, True), (torch.zeros_like(given), False)):
        wanted = sampler.sample(condition, torch.tensor([0]), (8, 8), steps=2)[0]
        assert torch.equal(drawn, wanted) == same


def test_pooled_embeddings_beside_cached_latents(riae_run, tmp_path):
    """The cache holds none: they come from the set, for the same images."""
    shards = prepared(tmp_path, 30, (5,))
    encode(riae_run, shards, tmp_path / "latents")
    config = load_config(
        LATENTS,
        [
            *FEW,
            f"run={tmp_path / 'run'}",
            f"codec={riae_run}",
            f"data.shards={shards}",
            f"data.latents={tmp_path / 'latents'}",
            "train.steps=2",
            "train.batch=8",
        ],
    )
    train(config)
    meta = Checkpoint.open(tmp_path / "run").meta
    tokens = Sampler.load(tmp_path / "run").model.condition(torch.zeros(1, 5))
    assert meta.model["embedding"] == [5] and tokens.shape == (1, 2, 32)
    opened = ShardSet.open(shards, embeddings=True)
    cache = LatentCache.open(tmp_path / "latents", meta.model["codec_hash"], opened.digest)
    (batch,) = next(
        latent_loader(
            cache,
            opened,
            config.data,
            split="train",
            batch=8,
            micro_batch=8,
            seed=0,
            start_step=1,
            total_steps=2,
        )
    )
    split = opened.split("train")
    assert (
        np.array_equal(batch["embedding"], split.embedding[batch["index"]])
        and batch["embedding"].dtype == torch.float16
    )
