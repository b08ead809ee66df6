"""Commands that use trained models: sample, reconstruct, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from r2id.cli.options import Device, Json, SizeList, app, find_device, parse_size, parse_sizes, parse_window, report


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

    result = draw_grids(checkpoint, out, parse_sizes(size), labels=tuple(label or ()), count=count, steps=steps,
                        guidance=cfg, solver=solver, seed=seed, grid=parse_size(grid) if grid else None,
                        overwrite=overwrite, device=find_device(device))
    report(result, as_json, lambda r: [f"{path}" for path in r["files"]])


@app.command()
def reconstruct(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="RIAE checkpoint or run directory.")],
    image: Annotated[Path, typer.Argument(help="A picture of any size.")],
    out: Annotated[Path, typer.Option(help="PNG file, or a folder for one per size; must not exist.")],
    size: SizeList = None,
    window: Annotated[str | None, typer.Option(metavar="y0,x0,y1,x1", help="Decode the rows y0 to y1 and the columns x0 to "
                                               "x1 alone, in pixels of the picture of --size.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a picture and decode it, or a window of it, at any sizes; default its own."""
    from r2id.sampling import reconstruct_file

    result = reconstruct_file(checkpoint, image, out, parse_sizes(size), window=parse_window(window), overwrite=overwrite,
                              device=find_device(device))
    report(result, as_json, lambda r: [f"{path}" for path in r["files"]]
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

    result = run_evaluate(checkpoint, shards, out, sizes=parse_sizes(size), count=count, seed=seed,
                          device=find_device(device))
    report(result, as_json, lambda r: [*r["headlines"], f"report: {out / 'report.html'}"])
