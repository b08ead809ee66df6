"""Real, small things that many tests share: the digits' shards, and checkpoints trained on them for a few steps."""

import os
from pathlib import Path

import pytest
import torch

from r2id.config import load_config

os.environ.setdefault("DS_ACCELERATOR", "cpu")
torch.set_num_threads(2)

CONFIGS = Path(__file__).parent.parent / "configs"

TINY_RIAE = [
    "riae.width=32",
    "riae.pixel_width=32",
    "riae.heads=2",
    "riae.encoder_blocks=1",
    "riae.decoder_blocks=1",
    "train.steps=60",
    "train.batch=32",
    "optim.warmup=10",
    "train.log_every=20",
    "tracking.enabled=false",
]
TINY_R2ID = [
    "r2id.width=32",
    "r2id.heads=2",
    "r2id.encoder_blocks=1",
    "r2id.decoder_blocks=1",
    "train.steps=40",
    "train.batch=32",
    "optim.warmup=10",
    "train.log_every=20",
    "sample.steps=4",
    "tracking.enabled=false",
]


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """Shards of the digits."""
    from data_prep.prepare import prepare
    from r2id.config import PrepareConfig

    out = tmp_path_factory.mktemp("digits") / "shards"
    prepare(PrepareConfig(dataset="digits", out=out))
    return out


@pytest.fixture(scope="session")
def riae_run(digits, tmp_path_factory) -> Path:
    """Run directory of a small RIAE, trained for 60 steps."""
    from r2id.training.loop import train

    run = tmp_path_factory.mktemp("riae") / "run"
    train(
        load_config(
            CONFIGS / "digits" / "riae.toml", [*TINY_RIAE, f"run={run}", f"data.shards={digits}"]
        )
    )
    return run


@pytest.fixture(scope="session")
def latents(digits, riae_run, tmp_path_factory) -> Path:
    """Latent cache of the digits by that RIAE."""
    from r2id.training.encode import encode

    out = tmp_path_factory.mktemp("latents") / "cache"
    encode(riae_run, digits, out)
    return out


@pytest.fixture(scope="session")
def r2id_run(digits, riae_run, latents, tmp_path_factory) -> Path:
    """Run directory of a small R2ID, trained for 40 steps."""
    from r2id.training.loop import train

    run = tmp_path_factory.mktemp("r2id") / "run"
    train(
        load_config(
            CONFIGS / "digits" / "r2id.toml",
            [
                *TINY_R2ID,
                f"run={run}",
                f"data.shards={digits}",
                f"codec={riae_run}",
                f"data.latents={latents}",
            ],
        )
    )
    return run


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
