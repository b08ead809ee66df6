"""The one training loop: batches → loss → engine, with logs, previews, checkpoints, signals and resume."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from r2id import dist, rng
from r2id.checkpoints import checkpoint
from r2id.config import OptimConfig, R2idRun, RiaeRun, to_toml
from r2id.data.shards import ShardSet
from r2id.errors import InputError, NonFiniteError, Stopped
from r2id.models.codec import PIXELS_HASH
from r2id.models.coords import Size
from r2id.progress import Progress, say
from r2id.training.batch_split import micro_batch_size
from r2id.training.blocks import prepare_blocks
from r2id.training.engines import Engine, make_engine
from r2id.training.meter import Meter, matmul_peak
from r2id.training.nonfinite import blame
from r2id.training.profiling import Profile
from r2id.training.tasks import Batch, Stage, make_stage
from r2id.training.tracking import NullTracker, Tracker
from r2id.training.watchdog import Watchdog

_ORDER = ("train_split", "size", "max_pixels", "window", "flip", "batch_pixels", "shuffle")
"""Settings of the data that decide what a step holds."""

Preview = Callable[[Stage, nn.Module, Path], Path]
"""(stage, model with EMA weights, file to write) → the PNG: reconstructions or samples."""


def train(
    config: RiaeRun | R2idRun, preview: Preview | None = None, profile: bool = False
) -> dict[str, Any]:
    """Train one stage to its last step, from its newest checkpoint when there is one; ``profile`` writes a trace of ten
    steps to RUN/profile.

    Returns the last checkpoint, step and loss, and rates of all the steps made now (Meter). Raises InputError when config,
    data and run directory do not fit together, NonFiniteError before a spoilt update, Stopped after SIGTERM or SIGINT with
    everything saved.
    """
    world = dist.init()
    done = _finished(config)
    if done is not None:
        return {"checkpoint": done, "step": checkpoint.load_meta(done).step}
    stage = make_stage(config, world, micro_batch_size(config.train, world.world_size))
    prepare_blocks(list(stage.module.model.blocks()), config.train)
    engine = make_engine(
        stage.module, optim=config.optim, train=config.train, engine=config.engine, world=world
    )
    found = _find_checkpoint(stage)
    start = samples = 0
    if found is not None:
        checkpoint.load_into(engine, found)
        meta = checkpoint.load_meta(found)
        start, samples = meta.step, meta.samples
    with _stop_signals() as stopped:
        run = _Run(stage, engine, preview, start, samples, stopped, profile)
        try:
            result = run.loop()
        except BaseException as error:
            run.tracker.finish("KILLED" if isinstance(error, Stopped) else "FAILED")
            raise
        run.tracker.finish()
    return result


def learning_rate(step: int, optim: OptimConfig, total: int) -> float:
    """Linear warm-up from 0, then a cosine from lr to lr_end (Loshchilov & Hutter 2017) at the last step."""
    if step < optim.warmup:
        return optim.lr * (step + 1) / optim.warmup
    done = (step - optim.warmup) / max(1, total - 1 - optim.warmup)
    return optim.lr_end + 0.5 * (optim.lr - optim.lr_end) * (1 + math.cos(math.pi * min(1.0, done)))


class _Run:
    """One process's part of a run, from its first step to its last."""

    def __init__(
        self,
        stage: Stage,
        engine: Engine,
        preview: Preview | None,
        start: int,
        samples: int,
        stopped: Callable[[], bool],
        profile: bool,
    ) -> None:
        self.stage, self.engine, self.preview, self.stopped = stage, engine, preview, stopped
        self.start, self.samples, self.profile = start, samples, profile
        self.config, self.folder = stage.config, stage.config.run
        self.main = dist.is_main()
        if self.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.toml").write_text(to_toml(self.config))
            checkpoint.tidy(self.folder, start)
        self.tracker = self._start_tracker() if self.main else NullTracker()
        self.saved: Path | None = None
        self.last: dict[str, float] = {}
        self.skipped = 0
        self.previous: list[Batch] = []

    def loop(self) -> dict[str, Any]:
        train, step = self.config.train, self.start
        dtype = torch.bfloat16 if train.autocast else torch.float32
        meter = Meter(self.engine.device, self.stage.cost, matmul_peak(self.engine.device, dtype))
        batches = self.stage.loader(self.start)
        with (
            Watchdog(train.stall_seconds) as watchdog,
            Progress(
                f"train {self.config.stage}",
                train.steps,
                start=self.start,
                unit="images",
                per_item=train.batch,
                shown=self.main,
            ) as progress,
            Profile(self.folder / "profile") if self.profile else nullcontext() as traced,
        ):
            for step in range(self.start, train.steps):
                micro_batches = next(batches)
                meter.lap("data")
                grad_norm = self._step_or_skip(micro_batches, step, meter)
                meter.lap("step")
                watchdog.beat()
                done = step + 1
                stop = self._anyone(self.stopped())
                if done % train.log_every == 0 or done == train.steps or stop:
                    self.last |= meter.read()
                    progress.advance(note=f"loss {self.last.get('loss', math.nan):.4f}")
                    rate = learning_rate(step, self.config.optim, train.steps)
                    skipped = {"skipped_steps": self.skipped} if self.skipped else {}
                    self.tracker.metrics(
                        {**self.last, "lr": rate, "grad_norm": float(grad_norm), **skipped}, done
                    )
                else:
                    progress.advance()
                self._save_if_due(done, stop)
                if (done % train.preview_every == 0 or done == train.steps) and not stop:
                    self._show(done)
                watchdog.beat()
                if traced:
                    traced.step()
                meter.lap("pause")
                if stop:
                    raise Stopped(
                        f"{self.folder}: step {done} of {train.steps} saved; the same command goes on"
                    )
        return {"checkpoint": self.saved, "step": train.steps, **self.last, **meter.summary()}

    def _step_or_skip(self, micro_batches: list[Batch], step: int, meter: Meter) -> Tensor:
        """The gradient norm; NaN of a step that was left out. NonFiniteError, saying where it comes from, when no more
        may be."""
        try:
            norm = self._step(micro_batches, step, meter)
        except NonFiniteError as error:
            late = error.step < step  # then this step's own gradients are whole and wait
            batches = self.previous if late else micro_batches
            self.skipped += 1
            words = f"{error}; {self._blame(batches, error.step)}"
            if self.skipped > self.config.train.skip_nonfinite:
                raise NonFiniteError(words, error.step) from None
            say(f"skipped {self.skipped} of {self.config.train.skip_nonfinite}: {words}")
            rate = learning_rate(step, self.config.optim, self.config.train.steps)
            norm = self.engine.step(rate, step) if late else torch.tensor(math.nan)
        self.previous = micro_batches
        return norm

    def _blame(self, micro_batches: list[Batch], step: int) -> str:
        """Which samples, and which module, on this rank."""

        def forward() -> None:
            torch.manual_seed(int(rng.fold(self.config.seed, step, dist.rank())))
            for batch in micro_batches:
                self.engine.forward({**self.stage.to_inputs(self._to_device(batch)), "step": step})

        keys = [key for batch in micro_batches for key in batch["sample_ids"]]
        shown = ", ".join(keys[:3]) + (f", … ({len(keys)})" if len(keys) > 3 else "")
        return f"{blame(self.stage.module, forward)}; samples {shown}"

    def _to_device(self, batch: Batch) -> Batch:
        return {
            key: value.to(self.engine.device, non_blocking=True)
            if isinstance(value, Tensor)
            else value
            for key, value in batch.items()
        }

    def _step(self, micro_batches: list[Batch], step: int, meter: Meter) -> Tensor:
        """One optimizer step; every random draw that is not keyed by sample (dropout) is keyed by step and rank."""
        torch.manual_seed(int(rng.fold(self.config.seed, step, dist.rank())))
        seen: list[tuple[dict[str, Tensor], int, Size]] = []
        for batch in micro_batches:
            loss, figures = self.engine.forward(
                {**self.stage.to_inputs(self._to_device(batch)), "step": step}
            )
            self.engine.backward(loss, len(micro_batches))
            seen.append(
                (
                    {"loss": loss.detach(), **figures},
                    len(batch["index"]),
                    self.stage.image_size(batch),
                )
            )
        norm = self.engine.step(
            learning_rate(step, self.config.optim, self.config.train.steps), step
        )
        for micro_batch in seen:  # not those of a step that is left out
            meter.add(*micro_batch)
        self.samples += sum(len(batch["index"]) for batch in micro_batches) * dist.world_size()
        return norm

    def _save_if_due(self, done: int, stop: bool) -> None:
        train = self.config.train
        if (
            train.ema_profiles
            and done % (train.ema_snapshot_every or math.ceil(train.steps / 32)) == 0
        ):
            checkpoint.save_snapshot(self.folder, self.engine.state(), self._meta(done))
        milestone = train.milestone_every and done % train.milestone_every == 0
        if done % train.save_every == 0 or milestone or done == train.steps or stop:
            self._save(done)

    def _save(self, step: int) -> None:
        """Every rank writes its share of the state."""
        statistics = None
        if self.config.stage == "riae":  # whose averages are small enough for one rank
            ema = self.engine.ema_state()
            statistics = (
                self.stage.statistics(self._ema_model(ema), self.engine.device)
                if ema is not None
                else None
            )
        train = self.config.train
        self.saved = checkpoint.save(
            self.folder,
            self.engine.state(),
            self._meta(step),
            keep=train.keep,
            milestone_every=train.milestone_every,
            stats=statistics,
        )
        self.tracker.tag("checkpoint", str(self.saved))

    def _meta(self, step: int) -> checkpoint.Meta:
        return checkpoint.Meta(
            stage=self.config.stage,
            step=step,
            samples=self.samples,
            seed=self.config.seed,
            config=self.config.model_dump(mode="json"),
            model=self.stage.facts,
        )

    def _show(self, step: int) -> None:
        if self.preview is None:
            return
        ema = self.engine.ema_state()
        if self.main and ema is not None:
            picture = self.preview(
                self.stage, self._ema_model(ema), self.folder / "samples" / f"step-{step:08d}.png"
            )
            self.tracker.image(picture, "samples", step)
        dist.barrier()

    def _ema_model(self, ema: dict[str, Tensor]) -> nn.Module:
        model = self.stage.build_model()
        model.load_state_dict(ema)
        return model.to(self.engine.device).eval().requires_grad_(False)

    def _start_tracker(self) -> NullTracker:
        """Begin or continue this run directory's MLflow run, whose id is kept beside the config."""
        note = self.folder / "mlflow-run-id"
        known = note.read_text().strip() if note.exists() and self.start else None
        shards = self.stage.shards
        return Tracker.start(
            self.config.tracking,
            run_name=self.folder.name,
            stage=self.config.stage,
            params=self.config.model_dump(mode="json"),
            run_id=known,
            tags={f"fact.{key}": str(value) for key, value in self.stage.facts.items()},
            dataset=(shards.manifest.dataset, shards.digest, str(self.config.data.shards)),
            note=note,
        )

    def _anyone(self, flag: bool) -> bool:
        """True on every rank as soon as it is on one, so that all stop at the same step."""
        if dist.world_size() == 1:
            return flag
        return bool(dist.all_reduce_max(torch.tensor(float(flag), device=self.engine.device)))


def _finished(config: RiaeRun | R2idRun) -> Path | None:
    """The last checkpoint of a run that is done already, from the same settings, data and codec; told without loading
    any of them, so that a pipeline's second start is quick."""
    found = checkpoint.latest(config.run)
    if found is None:
        return None
    meta = checkpoint.load_meta(found)
    facts = {"digest": ShardSet.open(config.data.shards, config.data.stream).digest}
    if isinstance(config, R2idRun):
        facts["codec_hash"] = checkpoint.identity(config.codec) if config.codec else PIXELS_HASH
    if meta.stage != config.stage or meta.step < config.train.steps:
        return None
    then = _essentials(meta.config, meta.model)
    now = _essentials(config.model_dump(mode="json"), facts)
    return found if all(then.get(name, value) == value for name, value in now.items()) else None


def _find_checkpoint(stage: Stage) -> Path | None:
    """The run directory's newest checkpoint, if any; InputError when another run's lies there."""
    found = checkpoint.latest(stage.config.run)
    if found is None:
        return None
    meta = checkpoint.load_meta(found)
    if meta.stage != stage.config.stage:
        raise InputError(
            f"{stage.config.run}: holds a run of stage {meta.stage!r}, not {stage.config.stage!r}: "
            "choose another run directory"
        )
    then = _essentials(meta.config, meta.model)
    for name, value in _essentials(stage.config.model_dump(mode="json"), stage.facts).items():
        if then.get(name, value) != value:
            raise InputError(
                f"{stage.config.run}: holds a run with {name} = {then[name]!r}, not {value!r}: "
                "choose another run directory, or remove this one to start over"
            )
    say(f"{found}: going on from step {meta.step}")
    return found


def _essentials(config: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What may not change between two starts of one run."""
    sections = [config["stage"], *(["diffusion"] if "diffusion" in config else [])]
    settings = {
        f"{section}.{key}": value for section in sections for key, value in config[section].items()
    }
    recorded = {
        f"recorded {key}": value for key, value in facts.items() if key != "codec"
    }  # its hash counts
    order = {f"data.{name}": config["data"][name] for name in _ORDER if name in config["data"]}
    return {
        "seed": config["seed"],
        "train.batch": config["train"]["batch"],
        "train.ema_profiles": config["train"]["ema_profiles"],
        **order,
        **settings,
        **recorded,
    }


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT raise a flag that is read at the end of a step; a second SIGINT interrupts at once."""
    received: list[int] = []

    def note(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        say("stopping at the end of this step; everything will be saved")

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
