"""Configs of small models for tests that train them, and what two runs have in common."""

import torch

from r2id.checkpoints import Checkpoint
from r2id.config import load_config
from tests.conftest import ATTENTION_CONFIG, CONFIGS, TINY_ATTENTION, TINY_R2ID, TINY_RIAE


def riae_config(digits, run, *more):
    return load_config(
        CONFIGS / "digits" / "riae.toml",
        [*TINY_RIAE, "train.precision=float32", f"run={run}", f"data.shards={digits}", *more],
    )


def attention_config(digits, run, *more):
    """As riae_config, for an RIAE by attention."""
    return load_config(
        ATTENTION_CONFIG,
        [*TINY_ATTENTION, "train.precision=float32", f"run={run}", f"data.shards={digits}", *more],
    )


def r2id_config(digits, codec, run, *more):
    return load_config(
        CONFIGS / "digits" / "r2id.toml",
        [
            *TINY_R2ID,
            "train.precision=float32",
            f"run={run}",
            f"data.shards={digits}",
            f"codec={codec}",
            *more,
        ],
    )


def weights(run):
    return {kind: Checkpoint.open(run).tensors(kind) for kind in ("model", "ema", "optimizer")}


def assert_same(one, other):
    for kind, tensors in weights(one).items():
        for name, tensor in weights(other)[kind].items():
            assert torch.equal(tensor, tensors[name]), f"{kind} {name}"


def without_cache(config):
    return config.model_copy(update={"data": config.data.model_copy(update={"latents": None})})
