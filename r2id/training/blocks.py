"""Preparing a model's blocks for training: compilation and activation checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from r2id.config import TrainConfig


def prepare_blocks(blocks: Sequence[nn.Module], train: TrainConfig) -> None:
    """Compile a model's blocks and checkpoint their activations, as the config says.

    A block whose activations are checkpointed keeps none of them. It computes them again in the
    backward pass, which saves memory and takes time.
    """
    chosen = train.activation_checkpointing
    every = chosen if isinstance(chosen, int) else {"none": 0, "all": 1}[chosen]
    # ``forward`` is replaced, and the block is not wrapped, so that parameters keep their names.
    for number, block in enumerate(blocks, start=1):
        if train.compile:
            block.forward = torch.compile(block.forward)
        if every and number % every == 0:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
