"""The ``r2id`` command: a thin layer from arguments to the library, with one-line errors and stated exit codes."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r2id.errors import InputError, Stopped, WorkError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich",
                  help="Resolution-invariant image generation. Sizes are always height x width.")

data_app = typer.Typer(no_args_is_help=True, help="Look at shard sets, and fetch the index of one that is elsewhere.")
app.add_typer(data_app, name="data")
checkpoint_app = typer.Typer(no_args_is_help=True, help="Look at checkpoints, check them, and export their weights.")
app.add_typer(checkpoint_app, name="checkpoint")

Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...",
                                                       help="Overrides, as section.key=value.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
SizeList = Annotated[list[str] | None, typer.Option("--size", metavar="HxW",
                                                    help="Image height x width in pixels; may be repeated.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto: CUDA where there is a GPU.")]


def parse_size(text: str) -> tuple[int, int]:
    """'56x42' → (56, 42); InputError for anything else."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip().lower())
    if not match or not (int(match[1]) and int(match[2])):
        raise InputError(f"size {text!r}: must be HEIGHTxWIDTH in whole pixels of at least 1, such as 56x42")
    return int(match[1]), int(match[2])


def _sizes(texts: list[str] | None) -> tuple[tuple[int, int], ...]:
    return tuple(parse_size(text) for text in texts or ())


def _device(name: str):
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty((), device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r}: not usable here: {str(error).splitlines()[0]}") from None


def _report(result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]) -> None:
    """One JSON object, or the lines that a person reads."""
    print(json.dumps(result, default=str) if as_json else "\n".join(lines(result)))


@app.command()
def prepare(
    dataset: Annotated[Literal["digits", "mnist", "celeba", "imagenet", "folder", "webdataset"], typer.Argument(
        help="digits: shipped, 8x8; mnist: IDX files; celeba; imagenet: tars, Kaggle, Parquet or folders; folder: any "
             "folder, tar or zip of images; webdataset: existing tars.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    source: Annotated[Path | None, typer.Option(help="The dataset's files. Without it, mnist is downloaded.")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    engine: Annotated[Literal["processes", "dask", "ray"], typer.Option(help="What writes the shards.")] = "processes",
    address: Annotated[str | None, typer.Option(help="Of a Dask or Ray cluster. Default: one is started here.")] = None,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Largest shard in megabytes.")] = 256.0,
    labels: Annotated[Path | None, typer.Option(help="folder: CSV or Parquet of path, label and maybe split.")] = None,
    label: Annotated[str, typer.Option(help="celeba: what the class is: none, identity or an attribute.")] = "none",
    images: Annotated[Literal["aligned", "wild"], typer.Option(help="celeba: which images.")] = "aligned",
    max_megapixels: Annotated[float, typer.Option(min=0.0001, help="Larger images are rejected.")] = 100.0,
    max_rejects: Annotated[float, typer.Option(min=0, max=1, help="Share of images that may be unusable.")] = 0.01,
    as_json: Json = False,
) -> None:
    """Shard a dataset into webdataset tars at native sizes, with manifest, index and checksums."""
    from data_prep.prepare import prepare as run_prepare
    from r2id.config import PrepareConfig
    from r2id.data.shards import ShardSet

    if address and engine == "processes":
        raise InputError(f"address {address!r}: goes with --engine dask or ray")
    config = PrepareConfig(
        dataset=dataset, source=source, out=out, workers=workers, engine=engine, address=address, shard_mb=shard_mb,
        labels=labels, label=label, images=images, max_megapixels=max_megapixels, max_rejects=max_rejects)
    if engine == "processes":
        run_prepare(config)
    else:
        from pipelines.preparation import prepare_on_cluster
        prepare_on_cluster(config)
    _report({"out": out, **ShardSet.open(out).summary()}, as_json,
            lambda r: [f"{r['out']}: {', '.join(f'{n} {name}' for name, n in r['samples'].items())} images, "
                       f"{r['shards']} shards, {r['classes']} classes, {r['rejects']} rejected"])


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder written by prepare or encode.")],
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild damaged shards from the source.")] = False,
    source: Annotated[Path | None, typer.Option(help="Where the source is now, when it has moved.")] = None,
    as_json: Json = False,
) -> None:
    """Rehash and decode everything; exit 1 and a list when anything is damaged."""
    from data_prep.repair import repair as run_repair
    from r2id.data.latents import MANIFEST, verify_latents
    from r2id.data.shards import ShardSet
    from r2id.data.verify import verify as run_verify

    latents = (folder / MANIFEST).is_file()
    if source and not repair:
        raise InputError(f"source {source}: goes with --repair")
    if latents and repair:
        raise InputError(f"{folder}: latents are repaired by the r2id encode that wrote them: it rewrites what is damaged")
    damages = verify_latents(folder) if latents else run_verify(folder)
    repaired = run_repair(folder, damages, source) if repair and damages else {}
    damages = run_verify(folder) if repaired else damages
    summary = {} if latents or damages else ShardSet.open(folder).summary()
    count = f"{sum(summary['samples'].values())} images " if summary else ""
    lines = [str(damage) for damage in damages] or [f"{folder}: {count}intact"]
    _report({"intact": not damages, "damages": [vars(damage) for damage in damages], "repaired": repaired, **summary},
            as_json, lambda r: [*(f"{file}: {done}" for file, done in repaired.items()), *lines])
    if damages:
        raise typer.Exit(1)


@data_app.command("stats")
def data_stats(
    shards: Annotated[Path, typer.Argument(help="Folder written by prepare.")],
    out: Annotated[Path | None, typer.Option(help="PNG of the sizes, replaced. Default: NAME-sizes.png here.")] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="As data.size: resize every image to this.")] = None,
    window: Annotated[str | None, typer.Option(metavar="HxW", help="As data.window: train on parts this large.")] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="As data.max_pixels: the largest area.")] = 65536,
    batch: Annotated[int, typer.Option(min=1, help="As train.batch: samples per step.")] = 64,
    batch_pixels: Annotated[int | None, typer.Option(min=1, help="As data.batch_pixels: pixels per step.")] = None,
    as_json: Json = False,
) -> None:
    """Sizes, aspect ratios, classes, and the buckets that training would use with what each cuts off."""
    import numpy as np

    from r2id.config import DataConfig
    from r2id.data.pictures import draw_sizes
    from r2id.data.shards import ShardSet
    from r2id.data.stats import describe_stats, split_stats

    opened = ShardSet.open(shards)
    data = DataConfig(shards=shards, size=parse_size(size) if size else None, max_pixels=max_pixels,
                      window=parse_size(window) if window else None, batch_pixels=batch_pixels)
    splits = {name: split_stats(opened, data, name, batch)
              for name, entry in opened.manifest.splits.items() if entry.samples}
    picture = out or Path(f"{shards.resolve().name}-sizes.png")
    samples = [opened.split(name) for name in splits]
    draw_sizes(*(np.concatenate([getattr(part, side) for part in samples]) for side in ("height", "width"))).save(picture)
    _report({**opened.summary(), "splits": splits, "picture": picture}, as_json,
            lambda r: [*(line for name in splits for line in describe_stats(name, splits[name])), f"picture: {picture}"])


@data_app.command("index")
def data_index(
    address: Annotated[str, typer.Argument(help="Folder or URL of a shard set: http, s3, … as fsspec has them.")],
    out: Annotated[Path, typer.Option(help="Folder for its manifest and indexes.")],
    as_json: Json = False,
) -> None:
    """Fetch manifest and indexes of a shard set that is elsewhere: all that data.stream needs on disk."""
    from r2id.data.stream import fetch_index

    _report({"out": out, **fetch_index(address, out).summary()}, as_json,
            lambda r: [f"{out}: index of {sum(r['samples'].values())} images; train with data.shards={out} "
                       f"data.stream={address}"])


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of one stage, riae or r2id.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of the whole job.")] = 1,
    memory: Annotated[float, typer.Option(min=1, help="Memory of one GPU in GB (10⁹ bytes).")] = 80.0,
    share: Annotated[float, typer.Option(min=0.01, max=1, help="Share of --peak that training reaches.")] = 0.4,
    peak: Annotated[float, typer.Option(min=0.001, help="Peak of one GPU in TFLOP/s, such as 312 (A100) or 989 (H100) "
                                                        "in bfloat16.")] = 312.0,
    riae: Annotated[Path | None, typer.Option(help="Config of the RIAE, for R2ID while no checkpoint of it exists.")] = None,
    classes: Annotated[int | None, typer.Option(min=0, help="Classes, for R2ID while no shards exist.")] = None,
    as_json: Json = False,
) -> None:
    """What training would need, before it starts: parameters, memory by part, FLOPs, the largest micro-batch, days."""
    from r2id.training.planner import describe
    from r2id.training.planner import plan as run_plan

    result = run_plan(config, tuple(overrides or ()), gpus=gpus, gigabytes=memory, share=share, teraflops=peak, riae=riae,
                      classes=classes)
    _report(result, as_json, describe)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of one stage, riae or r2id.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Train one stage; goes on by itself where the run directory holds a checkpoint."""
    from r2id import dist
    from r2id.config import PipelineRun, load_config
    from r2id.sampling import preview
    from r2id.training.loop import train as run_train

    settings = load_config(config, overrides or ())
    if isinstance(settings, PipelineRun):
        raise InputError(f"{config}: stage 'pipeline' is for r2id run; r2id train takes 'riae' or 'r2id'")
    try:
        result, main_process = run_train(settings, preview), dist.is_main()
    finally:
        dist.shutdown()
    if main_process:
        _report(result, as_json, lambda r: [f"{r['checkpoint']}: step {r['step']}" + (
            f", loss {r['loss']:.4f}, {r['images_per_second']:.0f} images/s" if "loss" in r else ", already finished")])


@app.command()
def encode(
    riae: Annotated[Path, typer.Option(metavar="CKPT", help="RIAE checkpoint or run directory.")],
    shards: Annotated[Path, typer.Option(help="Folder written by prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for the latent cache.")],
    batch: Annotated[int, typer.Option(min=1, help="Images encoded at once.")] = 256,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes; 0 decodes in the encoding process.")] = 0,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Number format on disk.")] = "float32",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a whole dataset into a cache of raw latents; under torchrun in as many processes."""
    from r2id import dist
    from r2id.training.encode import encode as run_encode

    try:
        result = run_encode(riae, shards, out, batch=batch, workers=workers, dtype=dtype, device=_device(device))
        main_process = dist.is_main()
    finally:
        dist.shutdown()
    if main_process:
        _report(result, as_json, lambda r: [f"{r['out']}: {r['images']} images encoded"
                                            + (f", {r['reused']} found in place" if r["reused"] else "")])


@app.command()
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="R2ID checkpoint or run directory.")],
    out: Annotated[Path, typer.Option(help="PNG file, or a folder for one grid per size; must not exist.")],
    size: SizeList = None,
    label: Annotated[list[int] | None, typer.Option(min=0, help="Class; may be repeated. Default: all in turn.")] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images per size.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is none.")] = None,
    solver: Annotated[Literal["ddim", "dpmpp_2m"] | None, typer.Option(help="Sampler.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed SEED + i, at every size.")] = 0,
    grid: Annotated[str | None, typer.Option(metavar="hxw", help="Latent grid; default from the size.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw grids of samples at any sizes from one R2ID checkpoint."""
    from r2id.sampling import draw_grids

    result = draw_grids(checkpoint, out, _sizes(size), labels=tuple(label or ()), count=count, steps=steps,
                        guidance=cfg, solver=solver, seed=seed, grid=parse_size(grid) if grid else None,
                        overwrite=overwrite, device=_device(device))
    _report(result, as_json, lambda r: [f"{path}" for path in r["files"]])


@app.command()
def reconstruct(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="RIAE checkpoint or run directory.")],
    image: Annotated[Path, typer.Argument(help="A picture of any size.")],
    out: Annotated[Path, typer.Option(help="PNG file, or a folder for one per size; must not exist.")],
    size: SizeList = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a picture and decode it at any sizes; default its own."""
    from r2id.sampling import reconstruct_file

    result = reconstruct_file(checkpoint, image, out, _sizes(size), overwrite=overwrite, device=_device(device))
    _report(result, as_json, lambda r: [f"{path}" for path in r["files"]]
            + [f"PSNR at its own size: {r['psnr']:.2f} dB"])


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="R2ID or RIAE checkpoint or run directory.")],
    shards: Annotated[Path, typer.Option(help="Folder written by prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, figures and report.html.")],
    size: SizeList = None,
    count: Annotated[int, typer.Option(min=1, help="Samples per size.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="First seed of the samples.")] = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a checkpoint and write the report."""
    from r2id.evaluation.run import evaluate as run_evaluate

    result = run_evaluate(checkpoint, shards, out, sizes=_sizes(size), count=count, seed=seed, device=_device(device))
    _report(result, as_json, lambda r: [*r["headlines"], f"report: {out / 'report.html'}"])


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="TOML file of a pipeline.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline as a Prefect flow: prepare, train, encode, train, sample, evaluate."""
    from pipelines.pipeline import run_pipeline
    from r2id.config import PipelineRun, load_config

    settings = load_config(config, overrides or ())
    if not isinstance(settings, PipelineRun):
        raise InputError(f"{config}: stage {settings.stage!r} is for r2id train; r2id run takes 'pipeline'")
    result = run_pipeline(settings, config.parent)
    _report(result, as_json, lambda r: r["lines"])


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint or run directory (its newest).")]


@checkpoint_app.command("show")
def checkpoint_show(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """What it is: stage, step, samples, parameters, averages, model, codec, sizes."""
    from r2id.training.export import describe

    _report(describe(checkpoint), as_json, _checkpoint_lines)


def _checkpoint_lines(figures: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in figures["bytes"].items())
    averages = ", ".join(f"{kind} {value}" for kind, value in figures["averages"].items())
    return [
        f"{figures['checkpoint']}: {figures['stage']}, step {figures['step']} of {figures['steps']}",
        f"samples     {figures['samples']}, seed {figures['seed']}, from {figures['data']}",
        f"parameters  {figures['parameters']}",
        f"averages    {averages}; {figures['snapshots']} snapshots",
        "model       " + ", ".join(f"{name} {value}" for name, value in figures["model"].items()),
        "facts       " + ", ".join(f"{name} {value}" for name, value in figures["facts"].items()),
        *([f"codec       {figures['codec']}"] if figures["codec"] else []),
        f"megabytes   {figures['total_bytes'] / 1e6:.1f}: {sizes}; files of {figures['written_by']} ranks",
        f"identity    {figures['identity']}"]


@checkpoint_app.command("verify")
def checkpoint_verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Rehash all files; exit 1 and a list when anything is damaged."""
    from r2id.training.checkpoint import damages, resolve

    folder, found = resolve(checkpoint), damages(checkpoint)
    _report({"checkpoint": folder, "intact": not found, "damages": found}, as_json,
            lambda r: r["damages"] or [f"{folder}: intact"])
    if found:
        raise typer.Exit(1)


@checkpoint_app.command("export")
def checkpoint_export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(metavar="FILE.safetensors", help="File to write; must not exist.")],
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    ema: Annotated[str, typer.Option(metavar="default|SIGMA", help="Which average of the weights: the one that sampling "
                                     "uses, or one of this width, made of the run's snapshots.")] = "default",
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    as_json: Json = False,
) -> None:
    """One safetensors file of averaged weights with config and facts, for RIAE.from_pretrained and R2ID.from_pretrained."""
    from r2id.training.export import export

    try:
        sigma = None if ema == "default" else float(ema)
    except ValueError:
        raise InputError(f"--ema {ema!r}: must be default, or a width above 0 and below 0.28") from None
    result = export(checkpoint, out, dtype=dtype, sigma=sigma, overwrite=overwrite)
    _report(result, as_json, lambda r: [
        f"{r['file']}: {r['stage']} of step {r['step']}, {r['dtype']}, {r['bytes'] / 1e6:.1f} MB"] + ([
            f"average of width {r['average']} from {r['snapshots']} snapshots; its profile is off by {r['misfit']:.1%}"]
            if sigma else []))


def main() -> None:
    """Exit codes: 0 done, 1 the work failed, 2 wrong input or arguments, 75 stopped with everything saved."""
    try:
        app()
    except WorkError as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        sys.exit(75)


if __name__ == "__main__":
    main()
