"""How much work a training run is.

Builds the loss module and the batches of a run, and counts their operations and memory
(r2id.models.tracing). Nothing is computed: tensors have sizes and no contents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from r2id.config import LossConfig, R2idRun, RiaeConfig, RiaeRun
from r2id.models.coords import Size
from r2id.models.levels import check_halvings
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import Trace, count_flops, trace_step
from r2id.training.blocks import prepare_blocks
from r2id.training.losses.perceptual import load_perceptual
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import RiaeLoss, riae_loss


@dataclass(frozen=True)
class Dimensions:
    """Facts of a run's data and codec that, beside its config, decide the sizes of its tensors."""

    image: Size
    """Height and width of the training images whose steps have the most pixels."""
    copies: int
    """How many times ``train.batch`` images a step at that size has (``data.batch_pixels``)."""
    classes: int = 0
    """Number of classes, or of attributes where these are the condition."""
    riae: RiaeConfig | None = None
    """Architecture of the codec of an R2ID run; None when pixels are diffused."""
    embedding: tuple[int, ...] = ()
    """Shape of one embedding where embeddings are the condition."""
    shapes: int = 1
    """How many shapes an R2ID's steps have: latent grids, with their numbers of images."""


@dataclass(frozen=True)
class Cost:
    """What training on one image takes."""

    tokens: int
    """Latents of the image."""
    flops: int
    """Floating-point operations of the model's own work.

    A backward pass counts as two forward passes. Recomputing activations to save memory does not
    count (Chowdhery et al. 2022, "PaLM", appendix B). A loss's networks count too: a discriminator
    with the gradients of its penalties, which are a part of its forward pass, and a perceptual
    network.
    """


class Workload:
    """Builds the loss module and the inputs of a run, for counting."""

    def __init__(self, config: RiaeRun | R2idRun, dimensions: Dimensions) -> None:
        self.config, self.dimensions = config, dimensions
        self._traces: dict[tuple[int, bool], Trace] = {}

    def grid(self) -> Size:
        """Return the latent grid of the largest images."""
        codec = self.config.riae if isinstance(self.config, RiaeRun) else self.dimensions.riae
        return self.dimensions.image if codec is None else codec.grid_for(self.dimensions.image)

    def module(self, fullest: bool = True, kind: int = 0) -> RiaeLoss | R2idLoss:
        """Build the loss module.

        ``fullest``: with the config's activation checkpointing, and such that each step takes as
        much memory as any of its ``kind`` does (see fullest_steps); else for counting the
        operations of a plain step, in which nothing is resized.
        """
        config = self.config
        module: RiaeLoss | R2idLoss
        if isinstance(config, RiaeRun):
            loss = fullest_steps(config.loss)[kind] if fullest else plain_steps(config.loss)
            module = riae_loss(RIAE(config.riae, config.data.channels), loss, config.seed)
        else:
            classes, embedding = self.dimensions.classes, self.dimensions.embedding
            model = R2ID(config.r2id, self.channels(), classes, embedding)
            module = R2idLoss(model, config.diffusion, 1.0, config.seed)
        if fullest:
            # What is compiled cannot be traced.
            train = config.train.model_copy(update={"compile": False})
            prepare_blocks(module.model.blocks(), train, torch.device("cpu"))
        return module

    def perceptual(self) -> tuple[int, int, int]:
        """Count the loss's perceptual network.

        Returns the bytes of its weights, and for one image the bytes that it keeps and its
        operations; zeros when there is none.
        """
        if not isinstance(self.config, RiaeRun):
            return 0, 0, 0
        network, window = load_perceptual(self.config.loss), self.config.loss.window
        if network is None:
            return 0, 0, 0
        height, width = self.dimensions.image
        shown = (min(height, window[0]), min(width, window[1])) if window else (height, width)
        return network.weight_bytes, network.activations(shown), network.flops(shown)

    def inputs(self, samples: int) -> dict[str, torch.Tensor]:
        """Make the keyword arguments of the module for a micro-batch of zeros."""
        index = torch.zeros(samples, dtype=torch.int64)  # of the samples in their data set
        if isinstance(self.config, RiaeRun):
            return {"image": self._images(samples), "index": index}
        latent = torch.zeros(samples, self.channels(), *self.grid())
        condition = {
            "attributes": torch.zeros(samples, self.dimensions.classes, dtype=torch.int8),
            "embedding": torch.zeros(samples, *self.dimensions.embedding, dtype=torch.float16),
        }.get(self.config.r2id.condition, index - 1)
        return {"latent": latent, "condition": condition, "index": index}

    def _images(self, samples: int) -> torch.Tensor:
        return torch.zeros(samples, self.config.data.channels, *self.dimensions.image)

    def channels(self) -> int:
        """Return the number of channels of what is diffused: latents, or pixels without a codec."""
        riae = self.dimensions.riae
        return self.config.data.channels if riae is None else riae.latent_channels

    def codec(self) -> RIAE:
        """Build the codec; only for an R2ID run that has one."""
        assert self.dimensions.riae is not None
        return RIAE(self.dimensions.riae, self.config.data.channels)

    def trace(self, samples: int, as_on_gpu: bool) -> Trace:
        """Trace one micro-batch with this number of samples, of the kind that takes most memory.

        See trace_step. Traces are kept.
        """
        config = self.config
        bfloat16 = config.train.precision == "bfloat16_weights"

        def case(kind: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
            with _default_dtype(torch.bfloat16 if bfloat16 else torch.float32):
                module = self.module(kind=kind)
            return module, self.inputs(samples)

        key = samples, as_on_gpu
        if key not in self._traces:
            kinds = len(fullest_steps(config.loss)) if isinstance(config, RiaeRun) else 1
            traces = [
                trace_step(partial(case, kind), config.train.autocast, as_on_gpu)
                for kind in range(kinds)
            ]
            self._traces[key] = max(traces, key=Trace.most)
        return self._traces[key]

    def encodes(self) -> bool:
        """Tell whether training encodes each micro-batch: it has a codec and no cached latents."""
        return self.dimensions.riae is not None and self.config.data.latents is None

    def encode(self, samples: int) -> Callable[[], object]:
        """Make a function that encodes this number of images with the codec."""
        codec, image = self.codec(), self._images(samples)
        bfloat16 = self.config.train.autocast

        def encode() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                return codec.encode(image)

        return encode

    def forward(self) -> Callable[[], object]:
        """Make a function that runs one sample's forward pass, without recomputing anything."""
        return partial(self.module(fullest=False), **self.inputs(1), step=0)


def plain_steps(loss: LossConfig) -> LossConfig:
    """Change a loss so that no step resizes anything.

    With a discriminator as when it learns. A perceptual network is counted by itself, because a
    program in a file cannot be run without contents.
    """
    changes: dict[str, Any] = {"discriminator_start": 0, "perceptual": 0.0}
    return loss.model_copy(update=changes | {"magnify": 0.0, "equivariance": 0.0})


def fullest_steps(loss: LossConfig) -> list[LossConfig]:
    """Change a loss so that all steps are of one kind and as large as any of it.

    Returns one for each kind that may need the most memory.
    """
    kinds: list[dict[str, Any]] = [{}]
    if loss.magnify:
        # The largest copies, but smaller than the images: all that lies between points is drawn
        # too, so that such a step needs more than a plain one.
        largest = loss.magnify_scales[1]
        scale = largest if largest > 1 else 0.9 * largest
        kinds = [{"magnify": 1.0, "magnify_scales": (scale, scale)}]
    if loss.equivariance:
        largest = loss.equivariance_scales[1]
        kinds.append({"equivariance": 1.0, "equivariance_scales": (largest, largest)})
    return [plain_steps(loss).model_copy(update=changes) for changes in kinds]


def check_depth(config: R2idRun, grid: Size) -> None:
    """Raise InputError when an R2ID has more levels or scales than a training grid (h, w)."""
    check_halvings("r2id.levels", len(config.r2id.levels), grid)
    check_halvings("diffusion.multiscale", config.diffusion.multiscale, grid)


def image_cost(workload: Workload) -> Cost:
    """Count what training on one image of a workload's size takes."""
    flops = 3 * count_flops(workload.forward)  # forward, and backward as two of it
    flops += workload.perceptual()[2]
    if workload.encodes():
        flops += count_flops(lambda: workload.encode(1))
    return Cost(math.prod(workload.grid()), flops)


def parameter_count(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this block, make new tensors in this number format by default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
