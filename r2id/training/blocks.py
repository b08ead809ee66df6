"""Preparing a model's blocks for training: compilation and activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.utils.checkpoint import checkpoint as recompute

from r2id import dist
from r2id.config import TrainConfig
from r2id.errors import InputError
from r2id.progress import say
from r2id.training.compilers import INSTALL, missing

_STATIC_SHAPES = 8
"""Up to this number of shapes, each has compiled code of its own; more share code for all."""

# Versions of the code of one kind of block: shapes, under guidance and not, in training and not.
_VERSIONS = 8 * _STATIC_SHAPES


def prepare_blocks(
    blocks: Sequence[nn.Module],
    train: TrainConfig,
    device: torch.device,
    *,
    shapes: int | None = 1,
    gathered: bool = False,
) -> None:
    """Compile a model's blocks and checkpoint their activations, as the config says.

    A block whose activations are checkpointed keeps none of them. It computes them again in the
    backward pass, which saves memory and takes time. ``shapes`` is the number of different grids
    that the blocks will meet, None if many; ``gathered`` tells whether weights are gathered
    for each layer in turn, as at ZeRO's stage 3. Raises InputError when compilation was asked for
    and cannot be.
    """
    chosen = train.activation_checkpointing
    every = chosen if isinstance(chosen, int) else {"none": 0, "all": 1}[chosen]
    compiled = _compiles(train, device, gathered)
    # ``forward`` is replaced, and the block is not wrapped, so that parameters keep their names.
    for number, block in enumerate(blocks, start=1):
        if every and number % every == 0:
            block.forward = partial(recompute, block.forward, use_reentrant=False)
        if compiled:
            # Around the checkpoint, so that the compiler plans what is computed again.
            block.forward = _Compiled(block.forward, train, shapes)


def _compiles(train: TrainConfig, device: torch.device, gathered: bool) -> bool:
    """Tell whether blocks are compiled: as asked, or with ``auto`` on a GPU where that can be done.

    On a CPU compiling takes over a minute, and a step no less time than before: most of it is
    matrix products.
    """
    asked, gpu = train.compile, device.type == "cuda"
    if asked == "cuda_graphs":  # which records whole steps: r2id.training.recording
        return False
    if gathered and asked not in ("auto", False):
        raise InputError(
            f"train.compile = {asked!r}: does not go with engine.zero_stage 3, which gathers the "
            "weights of each layer in turn; use 'auto', or a stage of 0 to 2"
        )
    if not asked or (asked == "auto" and (gathered or not gpu)):
        return False
    lacking = missing(gpu)
    if lacking is None:
        return True
    if asked is True:
        raise InputError(f"train.compile = {asked!r}: {lacking}; {INSTALL}, or use 'auto'")
    if dist.is_main():
        say(f"blocks are not compiled, which is slower: {lacking}; {INSTALL}")
    return False


class _Compiled:
    """A function in compiled form, without graph breaks: one graph forward, one backward.

    Where the compiler gives up because there are too many versions, it says so and computes without
    it from then on.
    """

    def __init__(
        self, function: Callable[..., Any], train: TrainConfig, shapes: int | None
    ) -> None:
        limit = torch._dynamo.config
        limit.recompile_limit = max(limit.recompile_limit, _VERSIONS)
        self.plain = function
        self.function: Callable[..., Any] = torch.compile(
            function,
            fullgraph=True,
            dynamic=False if shapes is not None and shapes <= _STATIC_SHAPES else None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self.function(*args, **kwargs)
        except FailOnRecompileLimitHit:
            say(
                f"a block has met more than {_VERSIONS} combinations of shapes and goes on without "
                "compiled code, which is slower; train.compile=false if this is meant"
            )
            self.function = self.plain
            return self.plain(*args, **kwargs)
