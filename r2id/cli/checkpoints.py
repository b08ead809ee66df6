"""Commands about checkpoints: show, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from r2id.cli.fields import Fields, Given, with_fields
from r2id.cli.options import Device, Json, Overwrite, app, find_device, report
from r2id.config import SamplerConfig
from r2id.errors import InputError
from r2id.progress import counted

checkpoint_app = typer.Typer(
    no_args_is_help=True, help="Show and verify checkpoints, and export their weights."
)
app.add_typer(checkpoint_app, name="checkpoint", rich_help_panel="Models")
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
    by = figures["averages_by"]
    averages = ", ".join(f"{kind} of {by} {value}" for kind, value in figures["averages"].items())
    return [
        f"{figures['checkpoint']}: {figures['stage']}, "
        f"step {figures['step']} of {figures['steps']}",
        f"samples     {figures['samples']}, seed {figures['seed']}, from {figures['data']}",
        f"parameters  {figures['parameters']}",
        f"averages    {averages}; {counted(figures['snapshots'], 'snapshot')} for other widths",
        "model       " + ", ".join(f"{name} {value}" for name, value in figures["model"].items()),
        "facts       " + ", ".join(_fact(*fact) for fact in figures["facts"].items()),
        *([f"codec       {figures['codec']}"] if figures["codec"] else []),
        f"megabytes   {figures['total_bytes'] / 1e6:.1f}: {sizes}; "
        f"files of {counted(figures['written_by'], 'rank')}",
        f"identity    {figures['identity']}",
    ]


def _fact(name: str, value: Any) -> str:
    """Write a fact of a model for people, with its unit; see R2idTask for what they are."""
    if name == "image":
        return f"image {value[0]}x{value[1]} pixels in the median"
    if name == "base_side":
        return f"base_side {value:.3g} cells, where the noise schedule is not shifted"
    if name == "areas":
        return f"areas {value[0]} to {value[1]} latent cells"
    if name == "ratios":
        return f"ratios {value[0]:.3g} to {value[1]:.3g} height / width"
    return f"{name} {value}"


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
@with_fields
def checkpoint_export(
    checkpoint: Checkpoint,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER|FILE.safetensors",
            help="Folder to publish, with a model card and pictures, or one file; must not exist.",
        ),
    ],
    sampler: Annotated[Given, Fields(SamplerConfig, unset="the run's own")],
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
    guide: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT",
            help="R2ID whose averaged weights autoguidance moves away from, such as an earlier "
            "checkpoint of the run. Default: the guide that the run kept, if any.",
        ),
    ] = None,
    riae: Annotated[
        Path | None,
        typer.Option(
            metavar="RIAE",
            help="RIAE that decodes what an R2ID draws: the same encoder as its own, and a decoder "
            "that was trained further (loss.freeze_encoder). Default: its own.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="How the examples of a folder's model card call it, such as the hub id owner/name."
            " Default: the folder's name."
        ),
    ] = None,
    licence: Annotated[
        str | None,
        typer.Option(
            "--license",
            help="The hub's identifier of the licence that a folder's model card names, such as "
            "mit. Default: other, named unspecified.",
        ),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="Evaluation of this model, whose figures a folder's model card shows. Default: "
            "the folder report beside the run, if it is one.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a trained model to a folder or one file; other commands take it in place of a run.

    Settings of sampling that are given become those that its samples have by default.
    """
    from r2id.checkpoints import Checkpoint as Opened
    from r2id.checkpoints.export import export
    from r2id.models.codec import open_finetuned_riae
    from r2id.sampling.noise_shift import applied_exponent

    try:
        sigma = None if ema == "default" else float(ema)
    except ValueError:
        raise InputError(
            f"--ema {ema!r}: must be default, or a width above 0 and below 0.28"
        ) from None
    opened = Opened.open(checkpoint)
    options: dict[str, Any] = {
        "dtype": dtype,
        "sigma": sigma,
        "shift_exponent": applied_exponent(opened) if opened.meta.stage == "r2id" else None,
        "guide": guide,
        "riae": riae and open_finetuned_riae(riae, opened),
        "defaults": sampler,
        "overwrite": overwrite,
    }
    described = {"--name": name, "--license": licence, "--report": metrics}
    if out.suffix == ".safetensors":
        for option, value in described.items():
            if value is not None:
                raise InputError(f"{option} {value}: goes with a folder, not with the file {out}")
        result = export(opened, out, **options)
    else:
        from r2id.sampling.model_folder import export_folder

        result = export_folder(
            opened,
            out,
            name=name,
            licence=licence,
            report=metrics,
            device=find_device(device),
            **options,
        )
    report(result, as_json, _export_lines)


def _export_lines(done: dict[str, Any]) -> list[str]:
    lines = [
        f"{done['file']}: {done['stage']} of step {done['step']}, {done['dtype']}, "
        f"{done['bytes'] / 1e6:.1f} MB"
        + (f", with {done['riae'] or 'its RIAE'}" if done["codec"] else "")
        + (f", guided by step {done['guide']['step']}" if done["guide"] else "")
    ]
    if "misfit" in done:
        lines.append(
            f"average of width {done['average']} from {done['snapshots']} snapshots; "
            f"its profile is off by {done['misfit']:.1%}"
        )
    if "folder" in done:
        figures = "with the figures of its report" if done["report"] else "without a report"
        lines.append(f"{done['folder']}: a folder to publish, {figures}")
    return lines
