"""Commands about checkpoints: show, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r2id.cli.options import Json, Overwrite, app, report
from r2id.errors import InputError

checkpoint_app = typer.Typer(
    no_args_is_help=True, help="Show and verify checkpoints, and export their weights."
)
app.add_typer(checkpoint_app, name="checkpoint")
Checkpoint = Annotated[
    Path,
    typer.Argument(metavar="CKPT", help="Checkpoint, or run directory for its newest checkpoint."),
]


@checkpoint_app.command("show")
def checkpoint_show(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Show stage, step, samples, parameters, averages, model, codec and sizes of a checkpoint."""
    from r2id.checkpoints.export import describe

    report(describe(checkpoint), as_json, _checkpoint_lines)


def _checkpoint_lines(figures: dict[str, Any]) -> list[str]:
    sizes = ", ".join(f"{kind} {size / 1e6:.1f}" for kind, size in figures["bytes"].items())
    averages = ", ".join(f"{kind} {value}" for kind, value in figures["averages"].items())
    return [
        f"{figures['checkpoint']}: {figures['stage']}, "
        f"step {figures['step']} of {figures['steps']}",
        f"samples     {figures['samples']}, seed {figures['seed']}, from {figures['data']}",
        f"parameters  {figures['parameters']}",
        f"averages    {averages}; {figures['snapshots']} snapshots",
        "model       " + ", ".join(f"{name} {value}" for name, value in figures["model"].items()),
        "facts       " + ", ".join(f"{name} {value}" for name, value in figures["facts"].items()),
        *([f"codec       {figures['codec']}"] if figures["codec"] else []),
        f"megabytes   {figures['total_bytes'] / 1e6:.1f}: {sizes}; "
        f"files of {figures['written_by']} ranks",
        f"identity    {figures['identity']}",
    ]


@checkpoint_app.command("verify")
def checkpoint_verify(checkpoint: Checkpoint, as_json: Json = False) -> None:
    """Check the hashes of all files; list damaged ones and exit with 1."""
    from r2id.checkpoints.reading import find_checkpoint, find_damages

    folder = find_checkpoint(checkpoint)
    damages = find_damages(folder)
    report(
        {"checkpoint": folder, "intact": not damages, "damages": damages},
        as_json,
        lambda r: r["damages"] or [f"{folder}: intact"],
    )
    if damages:
        raise typer.Exit(1)


@checkpoint_app.command("export")
def checkpoint_export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors", help="File to write; must not exist.")
    ],
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"],
        typer.Option(help="Number format of the weights."),
    ] = "float32",
    ema: Annotated[
        str,
        typer.Option(
            metavar="default|SIGMA",
            help="Which average of the weights: the one that sampling uses, or one of this width, "
            "such as 0.15, which is computed from the run's snapshots.",
        ),
    ] = "default",
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write a trained model to one file, for sample, reconstruct, evaluate and from_pretrained."""
    from r2id.checkpoints import Checkpoint as Opened
    from r2id.checkpoints.export import export
    from r2id.sampling.noise_shift import applied_exponent

    try:
        sigma = None if ema == "default" else float(ema)
    except ValueError:
        raise InputError(
            f"--ema {ema!r}: must be default, or a width above 0 and below 0.28"
        ) from None
    opened = Opened.open(checkpoint)
    result = export(
        opened,
        out,
        dtype=dtype,
        sigma=sigma,
        shift_exponent=applied_exponent(opened) if opened.meta.stage == "r2id" else None,
        overwrite=overwrite,
    )
    report(result, as_json, _export_lines)


def _export_lines(done: dict[str, Any]) -> list[str]:
    lines = [
        f"{done['file']}: {done['stage']} of step {done['step']}, {done['dtype']}, "
        f"{done['bytes'] / 1e6:.1f} MB" + (", with its RIAE" if done["codec"] else "")
    ]
    if "misfit" in done:
        lines.append(
            f"average of width {done['average']} from {done['snapshots']} snapshots; "
            f"its profile is off by {done['misfit']:.1%}"
        )
    return lines
