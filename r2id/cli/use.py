"""Commands that use trained models: sample, reconstruct, evaluate, noise-shift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r2id.cli.fields import Fields, Given, with_fields
from r2id.cli.options import (
    MODEL,
    Device,
    Json,
    Model,
    Overwrite,
    SizeList,
    WithCodec,
    app,
    find_device,
    parse_sizes,
    parse_window,
    report,
    report_job,
)
from r2id.config import EvaluateConfig, SampleConfig, SamplerConfig, build
from r2id.config.arguments import parse_size
from r2id.errors import InputError

SAMPLER_FIELDS = tuple(SamplerConfig.model_fields)
"""How samples are computed: as in the run's config unless set. Help lists these options last."""
_OF_SAMPLER = tuple(name for name in SAMPLER_FIELDS if name != "guidance")
"""The same for evaluate, which takes several scales of guidance."""


@app.command(rich_help_panel="Models")
@with_fields
def sample(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="R2ID: " + MODEL)],
    out: Annotated[
        Path,
        typer.Option(
            help="PNG file, or folder for one picture per size; must not exist. With --format png "
            "or shards, a folder; if it is unfinished, the same command continues it."
        ),
    ],
    which: Annotated[Given, Fields(SampleConfig, without=SAMPLER_FIELDS, unset="the run's own")],
    sampler: Annotated[Given, Fields(SamplerConfig, unset="the run's own")],
    kind: Annotated[
        Literal["grid", "png", "shards"],
        typer.Option(
            "--format",
            help="What is written: one picture with all samples of a size, one PNG file per "
            "sample, or webdataset shards. Processes of torchrun share the work of the last two.",
        ),
    ] = "grid",
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            help="Attribute that the images have, NAME, or lack, -NAME, if the model was trained "
            "on attributes. May be repeated."
        ),
    ] = None,
    embedding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="Embedding of a text, in the shape that the model was trained on, or several, "
            "which images take in turn.",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            metavar="hxw", help="Height x width of the latent grid. Default: chosen by the size."
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw samples of any size from an R2ID checkpoint: a picture of all, or a file for each."""
    options = {
        "sizes": (),
        **which,
        "attributes": tuple(attribute or ()),
        "embedding": embedding,
        "grid": parse_size(grid, "grid", "cells") if grid else None,
        "device": find_device(device),
    }
    if kind != "grid":
        if overwrite:
            raise InputError(
                f"--overwrite: goes with --format grid; --format {kind} goes on with what is at "
                "--out"
            )
        _draw_many(checkpoint, out, kind, sampler, options, as_json)
        return
    from r2id.sampling.grids import draw_grids

    result = draw_grids(checkpoint, out, **options, **sampler, overwrite=overwrite)
    report(result, as_json, lambda r: [f"{path}" for path in r["files"]])


def _draw_many(
    checkpoint: Path,
    out: Path,
    kind: Literal["png", "shards"],
    sampler: Given,
    options: dict[str, Any],
    as_json: bool,
) -> None:
    from r2id.sampling.files import draw_many

    report_job(
        lambda: draw_many(checkpoint, out, **options, kind=kind, settings=sampler),
        as_json,
        lambda r: [
            f"{r['out']}: {r['images']} samples of {r['size'][0]}x{r['size'][1]}"
            + (f", {r['reused']} found in place" if r["reused"] else "")
        ],
    )


@app.command(rich_help_panel="Models")
def reconstruct(
    checkpoint: WithCodec,
    image: Annotated[Path, typer.Argument(help="Picture of any size.")],
    out: Annotated[
        Path, typer.Option(help="PNG file, or folder for one file per size; must not exist.")
    ],
    size: SizeList = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="y0,x0,y1,x1",
            help="Decode only the rows y0 to y1 and the columns x0 to x1 (exclusive), in pixels of "
            "the picture of --size.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a picture and decode it, or a window of it, at any size; by default at its own."""
    from r2id.sampling.reconstruction import reconstruct_file

    result = reconstruct_file(
        checkpoint,
        image,
        out,
        parse_sizes(size),
        window=parse_window(window),
        overwrite=overwrite,
        device=find_device(device),
    )
    report(
        result,
        as_json,
        lambda r: (
            [f"{path}" for path in r["files"]] + [f"PSNR at its own size: {r['psnr']:.2f} dB"]
        ),
    )


@app.command(rich_help_panel="Models")
@with_fields
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="R2ID or RIAE: " + MODEL)],
    shards: Annotated[Path, typer.Option(help="Folder written by r2id prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html, metrics.json and figures.")],
    measured: Annotated[Given, Fields(EvaluateConfig, without=_OF_SAMPLER)],
    sampler: Annotated[Given, Fields(SamplerConfig, only=_OF_SAMPLER, unset="the run's own")],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a checkpoint against test images and write a report."""
    from r2id.evaluation.run import evaluate as run_evaluate

    config = build(EvaluateConfig, measured)
    if config.guidance:
        sampler = {**sampler, "guidance": config.guidance}
    result = run_evaluate(
        checkpoint,
        shards,
        out,
        sizes=config.sizes,
        count=config.count,
        seed=config.seed,
        split=config.split,
        invariance=config.invariance_count if config.invariance else 0,
        extractor=config.extractor,
        extractor_size=config.extractor_size,
        device=find_device(device),
        **sampler,
    )
    report(result, as_json, lambda r: [*r["headlines"], f"report: {out / 'report.html'}"])


@app.command("noise-shift", rich_help_panel="Models")
def noise_shift(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="R2ID checkpoint or run directory.")
    ],
    shards: Annotated[Path, typer.Option(help="Folder written by r2id prepare.")],
    images: Annotated[
        int, typer.Option(min=1, help="Number of test images, taken at even distances.")
    ] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for noise-shift.json and noise-shift.png. Default: the folder report in "
            "the run directory."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the noise.")] = 0,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split that the images are of. Default: data.test_split of the model's training."
        ),
    ] = None,
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Use the exponent for all later samples of this checkpoint, until "
            "noise-shift.json is removed from its run directory.",
        ),
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure how much more noise larger latent grids need: the exponent k of the noise shift."""
    from r2id.evaluation.noise_shift import measure_noise_shift

    result = measure_noise_shift(
        checkpoint,
        shards,
        out,
        images=images,
        seed=seed,
        split=split,
        apply=apply,
        device=find_device(device),
    )
    report(result, as_json, _noise_shift_lines)


def _noise_shift_lines(found: dict[str, Any]) -> list[str]:
    grids = [
        f"{name}: displaced by {grid['displacement']:+.2f} in logSNR; "
        f"RMS difference {grid['mismatch_unshifted']:.4f}, shifted {grid['mismatch_shifted']:.4f}"
        + ("" if grid["trained"] else "; a grid that was not trained")
        for name, grid in found["grids"].items()
    ]
    return [
        *grids,
        f"k = {found['k']:.3f}, residual {found['residual']:.3f} in logSNR; "
        f"used so far: {found['used_before']:.3f}",
    ]


@app.command("app", rich_help_panel="Models")
def serve_page(
    checkpoint: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    device: Device = "auto",
) -> None:
    """Show a page in the browser: draw, zoom, edit and upload pictures of any size."""
    from r2id.app.actions import Actions
    from r2id.app.page import serve
    from r2id.pipeline import Pipeline

    pipe = Pipeline.from_pretrained(checkpoint, device=find_device(device))
    serve(Actions(pipe), checkpoint, host, port, lambda url: print(url, flush=True))
