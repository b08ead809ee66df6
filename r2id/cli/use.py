"""Commands that use trained models: sample, reconstruct, evaluate, noise-shift."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r2id.cli.options import (
    Device,
    Json,
    SizeList,
    app,
    find_device,
    parse_size,
    parse_sizes,
    parse_window,
    report,
)
from r2id.errors import InputError


@app.command()
def sample(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="R2ID checkpoint or run directory.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="PNG file, or a folder for one grid per size; must not exist. With --format png "
            "or shards a folder, which is gone on with where it is unfinished."
        ),
    ],
    size: SizeList = None,
    kind: Annotated[
        Literal["grid", "png", "shards"],
        typer.Option(
            "--format",
            help="One picture of all samples per size; or a PNG file for each sample; or webdataset shards. Under "
            "torchrun each process draws its share of the last two.",
        ),
    ] = "grid",
    label: Annotated[
        list[int] | None, typer.Option(min=0, help="Class; may be repeated. Default: all in turn.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(help="NAME that images have, or -NAME that they lack; may be repeated."),
    ] = None,
    embedding: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.npy",
            help="Embedding of the text that images are drawn "
            "under, of the shape trained with; or N of them, in turn.",
        ),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Images per size.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps.")] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is none.")] = None,
    cfg_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW,HIGH", help="Times between which guidance applies: 0 is data, 1 noise."
        ),
    ] = None,
    solver: Annotated[
        Literal["ddim", "dpmpp_2m", "euler", "heun"] | None, typer.Option(help="Sampler.")
    ] = None,
    eta: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fresh noise in ddim: 0 none, 1 ancestral.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i has seed SEED + i, at every size.")] = 0,
    grid: Annotated[
        str | None, typer.Option(metavar="hxw", help="Latent grid; default from the size.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw samples at any sizes from one R2ID checkpoint: grids of them, or thousands into files."""
    from r2id.sampling.grids import draw_grids

    settings = {
        "steps": steps,
        "guidance": cfg,
        "guidance_interval": _interval(cfg_interval),
        "solver": solver,
        "eta": eta,
    }
    if kind != "grid":
        for name, given in (("attribute", attribute), ("embedding", embedding)):
            if given:
                raise InputError(f"--{name}: goes with --format grid, not {kind}")
        if overwrite:
            raise InputError(
                f"--overwrite: goes with --format grid; --format {kind} goes on with what is at --out"
            )
        _draw_many(
            checkpoint,
            out,
            parse_sizes(size),
            kind=kind,
            labels=tuple(label or ()),
            count=count,
            seed=seed,
            grid=parse_size(grid) if grid else None,
            settings=settings,
            device=find_device(device),
            as_json=as_json,
        )
        return
    result = draw_grids(
        checkpoint,
        out,
        parse_sizes(size),
        labels=tuple(label or ()),
        attributes=tuple(attribute or ()),
        embedding=embedding,
        count=count,
        seed=seed,
        grid=parse_size(grid) if grid else None,
        overwrite=overwrite,
        device=find_device(device),
        **settings,
    )
    report(result, as_json, lambda r: [f"{path}" for path in r["files"]])


def _draw_many(
    checkpoint: Path,
    out: Path,
    sizes: tuple[tuple[int, int], ...],
    *,
    as_json: bool,
    **options: Any,
) -> None:
    from r2id import dist
    from r2id.sampling.files import draw_many

    try:
        result, main_process = draw_many(checkpoint, out, sizes, **options), dist.is_main()
    finally:
        dist.shutdown()
    if main_process:
        report(
            result,
            as_json,
            lambda r: [
                f"{r['out']}: {r['images']} samples of {r['size'][0]}x{r['size'][1]}"
                + (f", {r['reused']} found in place" if r["reused"] else "")
            ],
        )


def _interval(text: str | None) -> tuple[float, float] | None:
    """'0.2,0.8' → (0.2, 0.8)."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--cfg-interval {text!r}: must be LOW,HIGH, such as 0.2,0.8") from None
    return low, high


@app.command()
def reconstruct(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="RIAE checkpoint or run directory.")
    ],
    image: Annotated[Path, typer.Argument(help="A picture of any size.")],
    out: Annotated[
        Path, typer.Option(help="PNG file, or a folder for one per size; must not exist.")
    ],
    size: SizeList = None,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="y0,x0,y1,x1",
            help="Decode the rows y0 to y1 and the columns x0 to "
            "x1 alone, in pixels of the picture of --size.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a picture and decode it, or a window of it, at any sizes; default its own."""
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


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="R2ID or RIAE checkpoint or run directory.")
    ],
    shards: Annotated[Path, typer.Option(help="Folder written by prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json, figures and report.html.")],
    size: SizeList = None,
    count: Annotated[int, typer.Option(min=1, help="Samples per size.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="First seed of the samples.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Solver steps; default, here and below, the run's own."),
    ] = None,
    cfg: Annotated[float | None, typer.Option(min=0, help="Guidance scale; 1 is none.")] = None,
    cfg_interval: Annotated[
        str | None, typer.Option(metavar="LOW,HIGH", help="Times between which it applies.")
    ] = None,
    solver: Annotated[
        Literal["ddim", "dpmpp_2m", "euler", "heun"] | None, typer.Option(help="Sampler.")
    ] = None,
    invariance: Annotated[
        bool,
        typer.Option(
            "--invariance",
            help="Measure at fourteen sizes and aspect ratios too, against "
            "real images stretched to them.",
        ),
    ] = False,
    invariance_count: Annotated[
        int, typer.Option(min=1, help="Samples per size of --invariance.")
    ] = 500,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="TorchScript file or its address, uint8 images [N, 3, H, W] to "
            "features [N, D], such as Inception-v3 for the FID; its program is "
            "run, so use one that you trust. Default: the classifier trained "
            "here."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a checkpoint and write the report."""
    from r2id.evaluation.run import evaluate as run_evaluate

    result = run_evaluate(
        checkpoint,
        shards,
        out,
        sizes=parse_sizes(size),
        count=count,
        seed=seed,
        invariance=invariance_count if invariance else 0,
        extractor=extractor,
        device=find_device(device),
        steps=steps,
        guidance=cfg,
        guidance_interval=_interval(cfg_interval),
        solver=solver,
    )
    report(result, as_json, lambda r: [*r["headlines"], f"report: {out / 'report.html'}"])


@app.command("noise-shift")
def noise_shift(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="R2ID checkpoint or run directory.")
    ],
    shards: Annotated[Path, typer.Option(help="Folder written by prepare.")],
    images: Annotated[int, typer.Option(min=1, help="Test images, evenly spaced.")] = 256,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for noise-shift.json and noise-shift.png. Default: report in the "
            "run directory."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the noise.")] = 0,
    apply: Annotated[
        bool,
        typer.Option(
            "--apply",
            help="Draw this checkpoint's samples with the k found, until "
            "noise-shift.json is removed from its run directory.",
        ),
    ] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure by how much larger latent grids need more noise: the exponent k of the noise shift."""
    from r2id.evaluation.noise_shift import measure_noise_shift

    result = measure_noise_shift(
        checkpoint, shards, out, images=images, seed=seed, apply=apply, device=find_device(device)
    )
    report(
        result,
        as_json,
        lambda r: [
            *(
                f"{name}: displaced by {grid['displacement']:+.2f} in logSNR; RMS difference {grid['mismatch_unshifted']:.4f}, "
                f"shifted {grid['mismatch_shifted']:.4f}"
                + ("" if grid["trained"] else "; a grid that was not trained")
                for name, grid in r["grids"].items()
            ),
            f"k = {r['k']:.3f}, residual {r['residual']:.3f} in logSNR; used so far: {r['used_before']:.3f}",
        ],
    )
