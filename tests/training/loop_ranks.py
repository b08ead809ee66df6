"""The training loop, stopped and spoilt at chosen moments: in one process, or in each rank of a
job.
"""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from r2id import dist
from r2id.checkpoints import Checkpoint, reading
from r2id.config import RiaeRun, load_config
from r2id.errors import NonFiniteError, Stopped
from r2id.training import callbacks
from r2id.training.callbacks import Callback
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from r2id.training.state import TrainState
from r2id.training.tasks import make_task
from tests.conftest import CONFIGS, TINY_RIAE

STEPS = 30
"""More than an epoch of the digits, which has 23 steps of 64."""
STOPS = sorted(random.Random(3).sample(range(1, STEPS), 10))
ACCUMULATION = 2
SPOILT, SAVED = 3, 2
"""The step that is not finite, and the last one that was saved before it."""

Change = Callable[[WindowLoss, Callable[[], Any]], Any]


def config(shards: Path, run: Path, *more: str) -> RiaeRun:
    micro_batch = 64 // dist.world_size() // ACCUMULATION
    settings = [
        *TINY_RIAE,
        "riae.width=16",
        "train.precision=float32",
        f"train.steps={STEPS}",
        "train.batch=64",
        f"train.micro_batch={micro_batch}",
        "train.save_every=100000",
        "train.keep=99",
        "train.preview_every=100000",
        f"run={run}",
        f"data.shards={shards}",
    ]
    loaded = load_config(CONFIGS / "digits" / "riae.toml", [*settings, *more])
    assert isinstance(loaded, RiaeRun)
    return loaded


@contextmanager
def at_step(chosen: int, change: Change) -> Iterator[None]:
    """Within this block, something else happens in the forward passes of a step (from 0)."""
    forward = WindowLoss.forward

    def changed(self: WindowLoss, *args: Any, **batch: Any) -> Any:
        def run() -> Any:
            return forward(self, *args, **batch)

        return change(self, run) if batch["step"] == chosen else run()

    WindowLoss.forward = changed  # type: ignore[method-assign]
    try:
        yield
    finally:
        WindowLoss.forward = forward  # type: ignore[method-assign]


def stopped(config: RiaeRun, stop: int, rank: int) -> str:
    """What the loop says when one rank alone is sent SIGTERM before the first backward pass of
    step ``stop`` (from 1), and so amid the accumulation of its gradient.
    """
    sent: list[int] = []

    def terminate(_module: WindowLoss, run: Callable[[], Any]) -> Any:
        if dist.rank() == rank and not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return run()

    with at_step(stop - 1, terminate):
        try:
            train(config)
        except Stopped as said:
            return str(said)
    return "not stopped"


def stopped_at(
    stops: Sequence[int], shards: Path, folder: Path, rank: int, *more: str
) -> dict[str, Any]:
    """Train a run that is stopped at each of ``stops`` and goes on, and one that is left alone;
    how they differ.
    """
    whole, parts = (config(shards, folder / name, *more) for name in ("whole", "parts"))
    said = [stopped(parts, stop, rank) for stop in stops]
    train(parts)
    train(whole)
    if not dist.is_main():
        return {}
    saved = [
        Checkpoint.open(found).meta
        for found in reading.list_checkpoints(folder / "parts" / "checkpoints")
    ]
    return {
        "said": said,
        "saved": [[meta.step, meta.samples] for meta in saved],
        "differ": [
            f"{kind} {name}"
            for kind in ("model", "ema", "optimizer")
            for name, value in Checkpoint.open(folder / "whole").tensors(kind).items()
            if not torch.equal(value, Checkpoint.open(folder / "parts").tensors(kind)[name])
        ],
    }


def compiled(shards: Path, folder: Path, *more: str) -> tuple[float, int]:
    """Train a few steps with compiled blocks, whose code is PyTorch's own, and without.

    Half of the blocks recompute their activations. Returns how far the weights are apart, and
    how many graphs this rank compiled.
    """
    compiler = torch.compile
    torch.compile = partial(compiler, backend="eager")
    try:
        for name in ("true", "false"):
            train(
                config(
                    shards,
                    folder / name,
                    "train.steps=3",
                    "train.activation_checkpointing=2",
                    f"train.compile={name}",
                    *more,
                )
            )
    finally:
        torch.compile = compiler
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    dist.barrier()  # rank 0 writes the last of a checkpoint
    one, other = (Checkpoint.open(folder / name).tensors("model") for name in ("true", "false"))
    return max(float((one[name] - other[name]).abs().max()) for name in other), graphs


def nan_loss(_module: WindowLoss, run: Callable[[], Any]) -> Any:
    loss, figures = run()
    return loss * math.nan, figures


def infinite_gradient(_module: WindowLoss, run: Callable[[], Any]) -> Any:
    """The loss is as it was; its gradient is too large for float32."""
    loss, figures = run()
    return loss + (loss - loss.detach()) * 3e38 * 3e38, figures


def nan_parameter(module: WindowLoss, run: Callable[[], Any]) -> Any:
    parameter = module.model.decoder_blocks[0].norm.weight
    with torch.no_grad():
        for tensor in (
            parameter.data,
            getattr(parameter, "ds_tensor", None),
        ):  # whole, and this rank's share at stage 3
            if isinstance(tensor, Tensor) and tensor.numel():
                tensor.view(-1)[0] = math.nan
    return run()


HOWS: dict[str, Change] = {
    "loss": nan_loss,
    "gradient": infinite_gradient,
    "parameter": nan_parameter,
}


def spoilt(shards: Path, folder: Path, how: str, *more: str) -> dict[str, Any]:
    """What each rank says of a step that is spoilt on the last one, and what is left."""

    def spoil(module: WindowLoss, run: Callable[[], Any]) -> Any:
        return HOWS[how](module, run) if dist.rank() == dist.world_size() - 1 else run()

    said = "not stopped"
    with at_step(SPOILT, spoil):
        try:
            train(config(shards, folder, f"train.save_every={SAVED}", *more))
        except NonFiniteError as error:
            said = str(error)
    everyone = dist.gather_objects(said)
    if not dist.is_main():
        return {}
    newest = reading.find_checkpoint(folder)
    return {
        "said": everyone,
        "step": Checkpoint.open(newest).step,
        "damages": reading.find_damages(newest),
        "finite": all(
            bool(torch.isfinite(value).all())
            for kind in ("model", "ema", "optimizer")
            for value in Checkpoint.open(newest).tensors(kind).values()
        ),
    }


def of_stage(zero_stage: int) -> list[str]:
    """Settings of a ZeRO stage; stage 3 gathers even small parameters whenever they are used."""
    settings = [f"engine.zero_stage={zero_stage}"]
    if zero_stage == 3:
        settings.append(
            "engine.deepspeed={zero_optimization={stage3_param_persistence_threshold=0}}"
        )
    return settings


class Watcher(Callback):
    """Notes the number of images of each step, and the first step's batches and gradient."""

    def __init__(self) -> None:
        self.images, self.tokens, self.found = 0, 0, dict[str, Any]()
        WATCHERS.append(self)

    def post_step(self, state: TrainState) -> None:
        for result in state.results:
            self.images += result.images
            self.tokens += result.images * math.prod(result.size) // 4  # cells of 2x2 pixels
        if state.step == 1:
            self.found |= {"norm": float(state.grad_norm), "batches": state.micro_batches}
        self.found["samples"] = state.samples


WATCHERS: list[Watcher] = []


def ranks_streamed(world: dist.World, shards: Path, folder: Path) -> dict[str, Any]:
    """Train a few steps on a stream of two sizes, of which one has four times as many images."""
    run = config(
        shards,
        folder,
        *("seed=3", "train.steps=3", "train.batch=8", "train.micro_batch=2", "start=random"),
        *(f"data.stream={shards}", f"data.batch_pixels={32 * 8 * 8}"),
        *("engine.zero_stage=0", "loss.magnify=0", "loss.latent_noise=0"),
    )
    callbacks.REGISTRY += (Watcher,)
    try:
        figures = train(run)
    finally:
        callbacks.REGISTRY = callbacks.REGISTRY[:-1]
    watcher = WATCHERS.pop()
    batches = [part for parts in dist.gather_objects(watcher.found["batches"]) for part in parts]
    # The gradient of the mean error of all images of the first step.
    task = make_task(run, world, 2)
    images = [len(batch["index"]) for batch in batches]
    for batch, count in zip(batches, images, strict=True):
        loss, _ = task.module(**task.inputs(batch), step=0)
        (loss * count / sum(images)).backward()
    gradients = [p.grad for p in task.module.parameters() if p.grad is not None]
    return {
        "first": images,
        "norm": watcher.found["norm"],
        "expected": float(get_total_norm(gradients)),
        "images": watcher.images,
        "tokens": watcher.tokens,
        "samples": watcher.found["samples"],
        "tokens_per_image": figures["tokens_per_second"] / figures["images_per_second"],
    }


def ranks_stopped(_world: dist.World, stop: int, shards: Path, folder: Path) -> str:
    """The signal comes to rank 1 alone."""
    return stopped(config(shards, folder), stop, 1)


def ranks_stopped_at(
    _world: dist.World, zero_stage: int, stops: Sequence[int], shards: Path, folder: Path
) -> dict[str, Any]:
    """The signal comes to rank 1 alone."""
    return stopped_at(stops, shards, folder, 1, *of_stage(zero_stage))


def ranks_spoilt(
    _world: dist.World, zero_stage: int, how: str, shards: Path, folder: Path
) -> dict[str, Any]:
    return spoilt(shards, folder, how, *of_stage(zero_stage))


def ranks_compiled(_world: dist.World, stage: int, shards: Path, folder: Path) -> tuple[float, int]:
    return compiled(shards, folder, f"engine.zero_stage={stage}")
