"""What a run will need and how long it will take, told before anything is started."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from r2id.checkpoints import checkpoint
from r2id.config import DataConfig, PipelineRun, R2idRun, RiaeConfig, RiaeRun, load_config
from r2id.data.loader import image_sizes
from r2id.data.manifest import MANIFEST
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.models.coords import Size
from r2id.models.pixels import DOWNSAMPLE
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import Trace, count_flops, trace_peak, trace_step
from r2id.training.batch_split import accumulation, micro_batch_size
from r2id.training.blocks import prepare_blocks
from r2id.training.conditions import known_conditions
from r2id.training.ema import decays
from r2id.training.engines.settings import deepspeed_config, engine_kind
from r2id.training.losses.r2id import R2idLoss
from r2id.training.losses.riae import RiaeLoss
from r2id.training.memory_plan import Sharing, peak

RUNTIME = 2_000_000_000
"""Bytes of a GPU that are nobody's tensors: CUDA's context and kernels, NCCL's buffers, holes between tensors."""


@dataclass(frozen=True)
class Facts:
    """What a plan takes beside the config, from what exists already or from the options."""

    image: Size
    """The largest size of the training images, which a step is counted at."""
    copies: int
    """How many times ``train.batch`` images a step has at that size (``data.batch_pixels``)."""
    classes: int = 0
    """Classes, or attributes where those are the condition."""
    riae: RiaeConfig | None = None
    """The codec of an R2ID run; none is of pixels."""
    embedding: tuple[int, ...] = ()
    """Their shape where they are the condition."""


def find_facts(
    config: RiaeRun | R2idRun, riae: Path | None = None, classes: int | None = None
) -> Facts:
    """``riae``, a config, and ``classes`` stand in for a codec and for shards that are not there yet. InputError where
    they are needed and missing."""
    shards = (
        ShardSet.open(config.data.shards) if (config.data.shards / MANIFEST).is_file() else None
    )
    image, copies = _largest_step(config, shards)
    if isinstance(config, RiaeRun):
        return Facts(image, copies)
    known = _expected_conditions(config, shards, classes)
    return Facts(
        image,
        copies,
        known["classes"],
        _codec_config(config, riae),
        tuple(known.get("embedding", ())),
    )


def _expected_conditions(
    config: R2idRun, shards: ShardSet | None, classes: int | None
) -> dict[str, Any]:
    """known_conditions of the shards, or of so many classes where those are given."""
    kind, missing = (
        config.r2id.condition,
        f"data.shards = '{config.data.shards}': no shards there yet",
    )
    if kind == "embedding" and shards is None:
        raise InputError(f"{missing}, and they alone say of what shape embeddings are")
    if kind in ("class", "attributes") and classes is not None:
        return {"classes": classes}
    if shards is not None:
        return known_conditions(config, shards)
    if kind != "none":
        raise InputError(f"{missing}; give their number of classes by --classes")
    return {"classes": 0}


def _largest_step(config: RiaeRun | R2idRun, shards: ShardSet | None) -> tuple[Size, int]:
    """The size whose steps have the most pixels, and copies of the batch in them."""
    data, batch = config.data, config.train.batch
    sizes = (
        set(image_sizes(shards, data, data.train_split)) if shards else {_size_without_shards(data)}
    )

    def copies(size: Size) -> int:
        return max(1, (data.batch_pixels or 0) // (batch * size[0] * size[1]))

    largest = max(sizes, key=lambda size: (copies(size) * size[0] * size[1], size))
    return largest, copies(largest)


def _size_without_shards(data: DataConfig) -> Size:
    """Fixed, or a square of as many pixels as images may have, or what a window takes of it."""
    side = math.isqrt(data.max_pixels)
    height, width = data.size or data.window or (side, side)
    return (height, width) if data.size else (min(height, side), min(width, side))


def _codec_config(config: R2idRun, riae: Path | None) -> RiaeConfig | None:
    if config.codec is None:
        return None
    if riae is not None:
        found = load_config(riae)
        if not isinstance(found, RiaeRun):
            raise InputError(f"{riae}: stage {found.stage!r}, must be 'riae'")
        return found.riae
    try:
        return RiaeConfig.model_validate(checkpoint.load_meta(config.codec).config["riae"])
    except InputError as error:
        raise InputError(
            f"codec: {error}; name the RIAE's config by --riae to plan without one"
        ) from None


class Work:
    """A run's module and batches, of the right sizes, to be counted."""

    def __init__(self, config: RiaeRun | R2idRun, facts: Facts) -> None:
        self.config, self.facts = config, facts
        self._traces: dict[tuple[int, bool], Trace] = {}

    def grid(self) -> Size:
        """The latent grid of the largest images."""
        codec = self.config.riae if isinstance(self.config, RiaeRun) else self.facts.riae
        downsample = DOWNSAMPLE if codec is None else codec.downsample
        height, width = (max(1, round(side / downsample)) for side in self.facts.image)
        return height, width

    def module(self, prepared: bool = True) -> RiaeLoss | R2idLoss:
        """``prepared``: with activations computed again where the config asks for that."""
        config = self.config
        module: RiaeLoss | R2idLoss
        if isinstance(config, RiaeRun):
            module = RiaeLoss(RIAE(config.riae, config.data.channels), config.seed)
        else:
            model = R2ID(config.r2id, self._channels(), self.facts.classes, self.facts.embedding)
            module = R2idLoss(model, config.diffusion, 1.0, config.seed)
        if prepared:
            prepare_blocks(
                module.model.blocks(), config.train.model_copy(update={"compile": False})
            )
        return module

    def inputs(self, samples: int) -> dict[str, torch.Tensor]:
        index = torch.zeros(samples, dtype=torch.int64)
        if isinstance(self.config, RiaeRun):
            return {
                "image": torch.zeros(samples, self.config.data.channels, *self.facts.image),
                "index": index,
            }
        latent = torch.zeros(samples, self._channels(), *self.grid())
        condition = {
            "attributes": torch.zeros(samples, self.facts.classes, dtype=torch.int8),
            "embedding": torch.zeros(samples, *self.facts.embedding, dtype=torch.float16),
        }.get(self.config.r2id.condition, index - 1)
        return {"latent": latent, "condition": condition, "index": index}

    def _channels(self) -> int:
        """Of what is diffused."""
        return (
            self.config.data.channels
            if self.facts.riae is None
            else self.facts.riae.latent_channels
        )

    def codec(self) -> RIAE:
        assert self.facts.riae is not None
        return RIAE(self.facts.riae, self.config.data.channels)

    def trace(self, samples: int, as_on_gpu: bool) -> Trace:
        """One micro-batch of so many samples."""

        def case() -> tuple[nn.Module, dict[str, torch.Tensor]]:
            with _default_dtype(
                torch.bfloat16
                if self.config.train.precision == "bfloat16_weights"
                else torch.float32
            ):
                module = self.module()
            return module, self.inputs(samples)

        if (samples, as_on_gpu) not in self._traces:
            self._traces[samples, as_on_gpu] = trace_step(
                case, self.config.train.autocast, as_on_gpu
            )
        return self._traces[samples, as_on_gpu]

    def encodes(self) -> bool:
        """Whether each micro-batch is encoded before R2ID sees it."""
        return self.facts.riae is not None and self.config.data.latents is None

    def encode(self, samples: int) -> Callable[[], object]:
        """A codec at work on so many images."""
        codec, image = (
            self.codec(),
            torch.zeros(samples, self.config.data.channels, *self.facts.image),
        )
        bfloat16 = self.config.train.autocast

        def encode() -> object:
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                return codec.encode(image)

        return encode

    def forward(self) -> Callable[[], object]:
        """The forward pass of one sample, nothing computed again."""
        return partial(self.module(prepared=False), **self.inputs(1), step=0)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Of the weights that are made within it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@dataclass(frozen=True)
class Cost:
    """What training on one image takes."""

    tokens: int
    """Latents."""
    flops: int
    """A backward pass costs two forward passes, and what is computed again to save memory does not count (Chowdhery et al.
    2022, "PaLM", appendix B)."""


def image_cost(work: Work) -> Cost:
    """Of the plan's largest images."""
    flops = 3 * count_flops(work.forward)
    if work.encodes():
        flops += count_flops(lambda: work.encode(1))
    return Cost(math.prod(work.grid()), flops)


def memory(work: Work, gpus: int, as_on_gpu: bool = True) -> dict[str, int]:
    """Bytes of one process of so many, by part and in total; see footprint.peak."""
    config = work.config
    with torch.device("meta"):
        parameters = elements(work.module())
        codec = 0 if work.facts.riae is None else 4 * elements(work.codec())
    local = engine_kind(config.train, config.engine, gpus) == "local"
    zero = (
        {}
        if local
        else deepspeed_config(config.optim, config.train, config.engine, gpus, parameters)
    )
    sharing = Sharing(
        parameters,
        gpus,
        None if local else config.engine.zero_stage,
        len(decays(config.train)),
        accumulation(config.train, gpus),
        zero.get("zero_optimization", {}),
        config.train.precision == "bfloat16_weights",
    )
    samples = micro_batch_size(config.train, gpus) * work.facts.copies
    visitor = trace_peak(lambda: work.encode(samples), as_on_gpu) if work.encodes() else 0
    return peak(sharing, work.trace(samples, as_on_gpu), codec, visitor)


def largest_micro_batch(
    config: RiaeRun | R2idRun, facts: Facts, gpus: int, limit: float
) -> int | None:
    """The largest that divides the global batch and whose memory, CUDA's own included, stays within ``limit`` bytes;
    none when not even one sample's does."""
    share = config.train.batch // gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def fits(size: int) -> bool:
        train = config.train.model_copy(update={"micro_batch": size})
        tried = Work(config.model_copy(update={"train": train}), facts)
        return memory(tried, gpus)["total"] + RUNTIME <= limit

    low, high = 0, len(sizes)  # sizes[:low] fit, sizes[high:] do not
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def plan(
    path: Path,
    overrides: tuple[str, ...] = (),
    *,
    gpus: int,
    gigabytes: float,
    share: float,
    teraflops: float,
    riae: Path | None = None,
    classes: int | None = None,
) -> dict[str, Any]:
    """Everything that ``r2id plan`` prints. Sizes are bytes, FLOPs those of one optimizer step of the whole job.

    ``gigabytes`` (10⁹ bytes) and ``teraflops`` (10¹² per second) are of one GPU; ``share`` is the part of them that
    training reaches. InputError for a pipeline, a batch that does not divide, and facts that are missing.
    """
    config = load_config(path, overrides)
    if isinstance(config, PipelineRun):
        raise InputError(
            f"{path}: stage 'pipeline'; plan its stages one by one: {config.riae.config}, "
            f"{config.r2id.config}"
        )
    facts = find_facts(config, riae, classes)
    work = Work(config, facts)
    found = memory(work, gpus)
    cost = image_cost(work)
    flops = cost.flops * config.train.batch * facts.copies
    seconds = flops / (gpus * teraflops * 1e12 * share)
    with torch.device("meta"):
        parameters = elements(work.module())
    images = config.train.batch * facts.copies
    return {
        "config": str(path),
        "stage": config.stage,
        "parameters": parameters,
        "image": list(facts.image),
        "grid": list(work.grid()),
        "tokens": cost.tokens,
        "gpus": gpus,
        "batch": images,
        "micro_batch": micro_batch_size(config.train, gpus),
        "accumulation": accumulation(config.train, gpus),
        "flops_per_step": flops,
        "memory": found,
        "reserved": RUNTIME,
        "limit": int(gigabytes * 1e9),
        "fits": found["total"] + RUNTIME <= gigabytes * 1e9,
        "largest_micro_batch": largest_micro_batch(config, facts, gpus, gigabytes * 1e9),
        "steps": config.train.steps,
        "seconds_per_step": seconds,
        "images_per_second": images / seconds,
        "days": seconds * config.train.steps / 86400,
        "share": share,
        "peak_tflops": teraflops,
    }


def describe(result: dict[str, Any]) -> list[str]:
    """A plan as lines for a person."""
    (height, width), (rows, columns) = result["image"], result["grid"]
    memory = {name: value for name, value in result["memory"].items() if name != "total" and value}
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.items())
    total, limit = (result["memory"]["total"] + result["reserved"]) / 1e9, result["limit"] / 1e9
    largest = result["largest_micro_batch"]
    return [
        f"{result['stage']}: {result['parameters'] / 1e6:.1f} M parameters; {result['tokens']} tokens per image "
        f"({rows}x{columns} latents of {height}x{width} pixels)",
        f"step: {result['batch']} images on {result['gpus']} GPUs, micro-batches of {result['micro_batch']}, "
        f"{result['accumulation']} per step; {result['flops_per_step'] / 1e12:.2f} TFLOP",
        f"memory per GPU in GB at its peak: {parts}, CUDA {result['reserved'] / 1e9:.2f}: {total:.2f} of {limit:g}, "
        + ("fits" if result["fits"] else "does not fit"),
        "largest micro-batch that fits: "
        + (f"{largest}" if largest else "none, not even one image"),
        f"time: {result['days']:.1f} days for {result['steps']} steps at {result['share']:.0%} of "
        f"{result['peak_tflops']:g} TFLOP/s ({result['images_per_second']:.0f} images/s)",
    ]
