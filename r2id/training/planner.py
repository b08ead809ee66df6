"""``r2id plan``: estimating what a run will need and how long it will take, before it starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints.trained import open_trained, read_section
from r2id.config import DataConfig, PipelineRun, R2idRun, RiaeConfig, RiaeRun, load_config
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.data.loader import split_buckets
from r2id.data.manifest import MANIFEST
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.models.coords import Size
from r2id.models.tracing import trace_peak
from r2id.training import pca, recording
from r2id.training.communication import Gpu, seconds, step_time, traffic
from r2id.training.conditions import condition_facts
from r2id.training.disk_estimate import describe_disk, disk
from r2id.training.ema import decays
from r2id.training.engines.settings import deepspeed_config, engine_kind
from r2id.training.memory_estimate import Sharding, peak
from r2id.training.reading_rate import reading_rate
from r2id.training.workload import Dimensions, Workload, check_depth, image_cost, parameter_count

RUNTIME = 2_000_000_000
"""Bytes of a GPU set aside for all but tensors: CUDA, kernels, NCCL's buffers, fragmentation."""


def find_dimensions(
    config: RiaeRun | R2idRun, riae: Path | RiaeConfig | None = None, classes: int | None = None
) -> Dimensions:
    """Find the dimensions of a run from its shards and its codec.

    Where these do not exist yet, ``riae`` (an RIAE's architecture, or the path of its config)
    stands in for the codec, and ``classes`` for what the shards would say. Raises InputError where
    a stand-in is needed and not given.
    """
    shards = _open_shards(config.data)
    steps = _find_steps(config, shards)
    images, image = max(steps, key=lambda step: (step[0] * math.prod(step[1]), step[1]))
    copies = images // config.train.batch
    if isinstance(config, RiaeRun):
        return Dimensions(image, copies)
    facts = _expected_conditions(config, shards, classes)
    codec = _codec_config(config, riae)
    shapes = len({(count, codec.grid_for(size) if codec else size) for count, size in steps})
    if shards is None and config.data.size is None:
        shapes = recording.MOST + 1  # images may have any sizes
    embedding = tuple(facts.get("embedding", ()))
    return Dimensions(image, copies, facts["classes"], codec, embedding, shapes)


def _expected_conditions(
    config: R2idRun, shards: ShardSet | None, classes: int | None
) -> dict[str, Any]:
    """Return the condition_facts of the shards, or of ``classes`` where these are given."""
    kind = config.r2id.condition
    missing = f"data.shards = '{config.data.shards}': no shards there yet"
    if kind == "embedding" and shards is None:
        raise InputError(f"{missing}, and the shape of embeddings is known from them alone")
    if kind in ("class", "attributes") and classes is not None:
        return {"classes": classes}
    if shards is not None:
        return condition_facts(config, shards)
    if kind != "none":
        raise InputError(f"{missing}; give their number of classes by --classes")
    return {"classes": 0}


def _find_steps(config: RiaeRun | R2idRun, shards: ShardSet | None) -> list[tuple[int, Size]]:
    """List the kinds of steps: their numbers of images, and the images' sizes.

    With ``data.batch_pixels`` a step of small images has several times ``train.batch`` images, if
    there are as many of their size.
    """
    data, batch = config.data, config.train.batch
    if shards is None:
        size = _size_without_shards(data)
        copies = max(1, (data.batch_pixels or 0) // (batch * math.prod(size)))
        return [(copies * batch, size)]
    buckets = split_buckets(shards.split(data.train_split), data)
    return list(zip(buckets.batch_sizes(batch, data.batch_pixels), buckets.sizes, strict=True))


def _size_without_shards(data: DataConfig) -> Size:
    """Return the config's fixed size, or else the largest square, cut to the window if any."""
    side = math.isqrt(data.max_pixels)
    height, width = data.size or data.window or (side, side)
    return (height, width) if data.size else (min(height, side), min(width, side))


def _assumes_image(data: DataConfig) -> bool:
    """Whether the size of the images is unknown before there are shards."""
    return data.size is None and data.window is None and not _prepared(data)


def _prepared(data: DataConfig) -> bool:
    return (data.shards / MANIFEST).is_file()


def _open_shards(data: DataConfig) -> ShardSet | None:
    return ShardSet.open(data.shards) if _prepared(data) else None


def _codec_config(config: R2idRun, riae: Path | RiaeConfig | None) -> RiaeConfig | None:
    """Return the architecture of a run's codec; None when the run diffuses pixels."""
    if config.codec is None:
        return None
    if isinstance(riae, RiaeConfig):
        return riae
    if riae is not None:
        loaded = load_config(riae)
        if not isinstance(loaded, RiaeRun):
            raise InputError(f"{riae}: stage {loaded.stage!r}, must be 'riae'")
        return loaded.riae
    try:
        return read_section(open_trained(config.codec, "riae"), "riae", RiaeConfig)
    except InputError as error:
        raise InputError(
            f"codec: {error}; name the RIAE's config by --riae to plan without one"
        ) from None


def memory(workload: Workload, gpus: int, as_on_gpu: bool = True) -> dict[str, int]:
    """Estimate the bytes of each of ``gpus`` processes, by part and in total; see ``peak``."""
    config = workload.config
    with torch.device("meta"):
        has_codec = workload.dimensions.riae is not None
        codec = 4 * parameter_count(workload.codec()) if has_codec else 0
    sharding = _sharding(config, gpus, _tensors(workload))
    samples = micro_batch_size(config.train, gpus) * workload.dimensions.copies
    encode = trace_peak(lambda: workload.encode(samples), as_on_gpu) if workload.encodes() else 0
    trace = workload.trace(samples, as_on_gpu)
    needed = peak(sharding, trace, codec, encode)
    if as_on_gpu and records_several(workload, gpus):
        # As if all shapes were as large as the largest: while one runs that is not recorded, those
        # that are keep the memory of a pass, and of each one's gradients.
        others = min(workload.dimensions.shapes - 2, recording.MOST - 1)
        needed["recordings"] = trace.most() + others * sharding.whole
        needed["total"] += needed["recordings"]
    weights, kept, _ = workload.perceptual()
    if weights:  # it is there when the fullest instant of the others comes: the loss
        needed["perceptual"] = weights + kept * samples
        needed["total"] += needed["perceptual"]
    return needed


def records_several(workload: Workload, gpus: int) -> bool:
    """Tell whether training records steps and has several shapes of them; see recording.MOST."""
    config = workload.config
    return (
        isinstance(config, R2idRun)
        and workload.dimensions.shapes > 1
        and engine_kind(config.train, config.engine, gpus) == "local"
        and recording.records(config.train, config.r2id)
    )


def _tensors(workload: Workload) -> list[int]:
    """Return the number of elements of each tensor that is trained."""
    with torch.device("meta"):
        return [parameter.numel() for parameter in workload.module().parameters()]


def _sharding(config: RiaeRun | R2idRun, gpus: int, tensors: list[int]) -> Sharding:
    local = engine_kind(config.train, config.engine, gpus) == "local"
    zero: dict[str, Any] = {}
    if not local:
        settings = deepspeed_config(config.optim, config.train, config.engine, gpus, sum(tensors))
        zero = settings["zero_optimization"]
    return Sharding(
        sum(tensors),
        gpus,
        None if local else config.engine.zero_stage,
        len(decays(config.train)),
        accumulation(config.train, gpus),
        zero,
        config.train.precision == "bfloat16_weights",
    )


def largest_micro_batch(
    config: RiaeRun | R2idRun, dimensions: Dimensions, gpus: int, limit: float
) -> int | None:
    """Find the largest micro-batch that divides a process's share and fits into ``limit`` bytes.

    The limit includes RUNTIME. None when not even one sample fits.
    """
    share = config.train.batch // gpus
    sizes = [size for size in range(1, share + 1) if share % size == 0]

    def fits(size: int) -> bool:
        train = config.train.model_copy(update={"micro_batch": size})
        workload = Workload(config.model_copy(update={"train": train}), dimensions)
        return memory(workload, gpus)["total"] + RUNTIME <= limit

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
    gpu: Gpu,
    share: float,
    riae: Path | RiaeConfig | None = None,
    classes: int | None = None,
) -> dict[str, Any]:
    """Compute everything that ``r2id plan`` prints of one stage.

    ``share`` is the part of a GPU's FLOP/s that training reaches. For ``riae`` and ``classes`` see
    find_dimensions, for pipelines r2id.training.pipeline_plan. In the result memory, disk and what
    is sent are in bytes, and FLOPs are those of one optimizer step of the whole job. Raises
    InputError for a batch that does not divide, and missing facts.
    """
    config = load_config(path, overrides)
    assert not isinstance(config, PipelineRun), "a pipeline has a plan for each stage"
    workload = Workload(config, find_dimensions(config, riae, classes))
    if isinstance(config, R2idRun):
        check_depth(config, workload.grid())
    dimensions = workload.dimensions
    limit = gpu.memory * 1e9
    needed = memory(workload, gpus)
    cost = image_cost(workload)
    images = config.train.batch * dimensions.copies
    with torch.device("meta"):
        parameters = parameter_count(workload.module().model)
    compute = cost.flops * images / (gpus * gpu.tflops * 1e12 * share)
    times = _times(workload, gpus, gpu, compute)
    per_second = images / times["seconds_per_step"]
    return {
        "config": str(path),
        "stage": config.stage,
        "parameters": parameters,
        "image": list(dimensions.image),
        "shards": str(config.data.shards),
        "image_assumed": _assumes_image(config.data),
        "grid": list(workload.grid()),
        "tokens": cost.tokens,
        "shapes": dimensions.shapes,
        "gpus": gpus,
        "gpu": gpu.name,
        "batch": images,
        "micro_batch": micro_batch_size(config.train, gpus) * dimensions.copies,
        "accumulation": accumulation(config.train, gpus),
        "flops_per_step": cost.flops * images,
        "memory": needed,
        "reserved": RUNTIME,
        "limit": int(limit),
        "fits": needed["total"] + RUNTIME <= limit,
        "largest_micro_batch": largest_micro_batch(config, dimensions, gpus, limit),
        "configured_micro_batch": config.train.micro_batch,
        "share_of_batch": config.train.batch // gpus,
        "disk": disk(workload, _open_shards(config.data)),
        "steps": config.train.steps,
        **times,
        "images_per_second": per_second,
        "loading": _loading(workload, per_second / gpus),
        "pca": _pca(config, dimensions),
        "days": times["seconds_per_step"] * config.train.steps / 86400,
        "share": share,
        "peak_tflops": gpu.tflops,
    }


def _times(workload: Workload, gpus: int, gpu: Gpu, compute: float) -> dict[str, Any]:
    """Estimate the seconds of a step: computing, sending, and both as far as they overlap."""
    tensors = _tensors(workload)
    sent = traffic(_sharding(workload.config, gpus, tensors), tensors)
    return {
        "compute_seconds": compute,
        "sent": round(sent.total),
        "communication_seconds": seconds(sent.total, gpus, gpu),
        "overlapped": sent.hidden > 0,
        "seconds_per_step": step_time(compute, sent, gpus, gpu),
    }


def _loading(workload: Workload, needed: float) -> dict[str, Any]:
    """Say how many loader workers give a process that many images per second."""
    values = math.prod(workload.grid()) * workload.channels()
    pixels = math.prod(workload.dimensions.image)
    rate, measured = reading_rate(workload.config.data, pixels, values)
    return {
        "needed": needed,
        "per_worker": rate,
        "measured": measured,
        "workers": math.ceil(needed / rate),
    }


def _pca(config: RiaeRun | R2idRun, dimensions: Dimensions) -> dict[str, int] | None:
    """Say how many images a PCA start reads and how many bytes of main memory it takes."""
    if not (isinstance(config, RiaeRun) and config.starts_from_pca and config.init_from is None):
        return None
    # Whole images are analysed, even if training cuts windows.
    side = math.isqrt(config.data.max_pixels)
    sizes = [(side, side) if config.data.window else dimensions.image]
    return {
        "images": pca.image_limit(sizes),
        "memory": pca.memory_need(sizes, config.data.channels, config.riae.cell),
    }


def describe(result: dict[str, Any]) -> list[str]:
    """Describe the result of ``plan`` in lines for people."""
    (height, width), (rows, columns) = result["image"], result["grid"]
    memory = {name: value for name, value in result["memory"].items() if name != "total" and value}
    parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.items())
    assumed = f", assumed, as {result['shards']} has no shards yet" * result["image_assumed"]
    total, limit = (result["memory"]["total"] + result["reserved"]) / 1e9, result["limit"] / 1e9
    largest, share = result["largest_micro_batch"], result["share_of_batch"]
    configured = result["configured_micro_batch"]
    cut = f" (train.micro_batch is {configured}, but {share} is a GPU's share of the batch)"
    whole = ", a GPU's whole share of the batch" * (largest == share)
    return [
        f"{result['stage']}: {result['parameters'] / 1e6:.1f} M parameters; {result['tokens']} "
        f"tokens per image ({rows}x{columns} latents of {height}x{width} pixels{assumed})",
        f"step: {result['batch']} images on {result['gpus']} × {result['gpu']}, micro-batches of "
        f"{result['micro_batch']}{cut * ((configured or 0) > share)}, "
        f"{result['accumulation']} per step; "
        f"{result['flops_per_step'] / 1e12:.2f} TFLOP",
        f"memory per GPU in GB at its peak: {parts}, CUDA {result['reserved'] / 1e9:.2f}: "
        f"{total:.2f} of {limit:g}, {'fits' if result['fits'] else 'does not fit'}",
        "largest train.micro_batch that fits: "
        + (f"{largest}{whole}" if largest else "none, not even one image"),
        *_describe_recordings(result),
        *_describe_times(result),
        describe_disk(result["disk"]),
    ]


def _describe_recordings(result: dict[str, Any]) -> list[str]:
    if "recordings" not in result["memory"]:
        return []
    assumed = ", assumed, " * result["image_assumed"] or " "
    return [
        f"recordings: steps of {result['shapes']} shapes{assumed}which share memory in part, each "
        "counted as the largest; train.compile=true records none"
    ]


def _describe_times(result: dict[str, Any]) -> list[str]:
    compute, sending, step = (
        1e3 * result[name]
        for name in ("compute_seconds", "communication_seconds", "seconds_per_step")
    )
    loading, start = result["loading"], result["pca"]
    spent = f"{compute:.3g} ms at {result['share']:.0%} of {result['peak_tflops']:g} TFLOP/s"
    if result["sent"]:
        spent = (
            f"{spent}, {sending:.3g} ms for {result['sent'] / 1e9:.2g} GB that each GPU sends; "
            f"{step:.3g} ms {'overlapped' if result['overlapped'] else 'one after the other'}"
        )
    return [
        f"time per step: {spent}",
        f"run: {describe_days(result['days'])} for {result['steps']} steps "
        f"({result['images_per_second']:.0f} images/s)",
        f"loading: {loading['needed']:.0f} images/s per GPU, of which a worker reads "
        f"{loading['per_worker']:.0f} ({'measured' if loading['measured'] else 'assumed'}): "
        f"data.workers={loading['workers']}",
        *(
            [
                f"start: a PCA of up to {start['images']:,} images, once, by one process; "
                f"{start['memory'] / 1e9:.2g} GB of main memory"
            ]
            if start
            else []
        ),
    ]


def describe_days(days: float) -> str:
    """Write a time in the unit that suits it."""
    for unit, length in (("days", 1.0), ("hours", 24.0)):
        if days * length >= 1:
            return f"{days * length:.1f} {unit}"
    return f"{days * 1440:.1f} minutes"
