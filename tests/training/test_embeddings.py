"""R2ID told the embeddings of texts: trained, sampled, exported, evaluated."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from data_prep.prepare import prepare
from r2id.config import DataConfig, PrepareConfig, R2idConfig
from r2id.config_files import load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.run import evaluate
from r2id.models.conditioning import drop
from r2id.models.r2id import R2ID
from r2id.sampling import Sampler, draw_grids
from r2id.training.encode import encode
from r2id.training.export import export
from r2id.training.loop import train
from r2id.training.planner import plan
from tests.conftest import CONFIGS, TINY_R2ID
from tests.test_cli import r2id  # noqa: F401

TOKENS, WIDTH, IMAGES, STEPS = 3, 8, 400, 300


def text_of(label: int) -> np.ndarray:
    """The embedding of a class's text: float32 [TOKENS, WIDTH]."""
    return np.random.default_rng(label).normal(size=(TOKENS, WIDTH)).astype(np.float32)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """Shards of digits that have no class, but the embedding of one, with noise."""
    folder = tmp_path_factory.mktemp("told")
    pixels, labels = load_digits(return_X_y=True)
    (folder / "in").mkdir()
    noise = np.random.default_rng(0)
    for number, (image, label) in enumerate(zip(pixels[:IMAGES], labels, strict=False)):
        Image.fromarray((image.reshape(8, 8) * 15.9).astype(np.uint8)).save(folder / f"in/{number}.png")
        np.save(folder / f"in/{number}.npy", text_of(label) + 0.1 * noise.normal(size=(TOKENS, WIDTH)))
    return prepare(PrepareConfig(dataset="folder", source=folder / "in", out=folder / "shards"))


@pytest.fixture(scope="module")
def arguments(told, riae_run, tmp_path_factory):
    latents = tmp_path_factory.mktemp("latents") / "cache"
    encode(riae_run, told, latents)
    return [*TINY_R2ID, f"data.shards={told}", f"codec={riae_run}", f"data.latents={latents}", "r2id.condition=embedding",
            f"train.steps={STEPS}", "train.ema=0.98", "train.log_every=100", "r2id.dropout=0.0"]


@pytest.fixture(scope="module")
def run(arguments, tmp_path_factory, one_thread):
    """Run directory of a small R2ID trained with embeddings, from a latent cache."""
    out = tmp_path_factory.mktemp("run") / "run"
    train(load_config(CONFIGS / "digits" / "r2id.toml", [*arguments, f"run={out}"]))
    return out


def test_the_loss_is_lower_told_the_right_embedding(run, told):
    sampler, shards = Sampler.load(run), ShardSet.open(told, embeddings=True)
    losses = torch.zeros(3)
    for batch in eval_loader(shards, DataConfig(shards=told), "train", 100):
        latents, right = sampler.codec.encode(batch["image"]), batch["embedding"]
        for number, condition in enumerate((right, right.roll(1, 0), torch.zeros_like(right))):
            losses[number] += sum(sampler.loss_at(latents, condition, time, 7).sum() for time in (0.5, 0.7, 0.9))
    print(losses)
    assert losses[0] < 0.95 * losses[1] and losses[0] < losses[2]
