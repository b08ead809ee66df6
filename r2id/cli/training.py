"""Commands that train: doctor, plan, train, encode and run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from r2id.cli.fields import Fields, Given, with_fields
from r2id.cli.options import Device, Json, Overrides, app, find_device, report, report_job
from r2id.config import EncodeConfig, PipelineRun, build, load_config
from r2id.errors import InputError
from r2id.stop_signals import left_at_a_signal


@app.command(rich_help_panel="Training")
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="TOML file of a stage or pipeline, to look at what that will use."),
    ] = None,
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Look at the machine before training: exit code 1 if something that it needs is broken."""
    from r2id.training.doctor import describe, examine

    found = examine(config, tuple(overrides or ()))
    report(found, as_json, describe)
    if not found["ready"]:
        raise typer.Exit(1)


@app.command(rich_help_panel="Training")
def plan(
    config: Annotated[Path, typer.Argument(help="TOML file of a stage, or of a pipeline.")],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs of the whole job.")] = 1,
    gpu: Annotated[
        str, typer.Option(help="Kind of GPU, for what is not given: a100, h100, h200, rtx5080.")
    ] = "a100",
    memory: Annotated[
        float | None, typer.Option(min=1, help="Memory of one GPU in GB (10⁹ bytes).")
    ] = None,
    share: Annotated[
        float,
        typer.Option(min=0.01, max=1, help="Share of --peak that training is expected to reach."),
    ] = 0.4,
    peak: Annotated[
        float | None, typer.Option(min=0.001, help="Peak speed of one GPU in TFLOP/s, in bfloat16.")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs of one computer.")
    ] = None,
    intra_node_bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s from one GPU to another of its node, one way."),
    ] = None,
    inter_node_bandwidth: Annotated[
        float | None,
        typer.Option(min=0.001, help="GB/s from one node to another, one way, of all adapters."),
    ] = None,
    riae: Annotated[
        Path | None,
        typer.Option(help="Config of the RIAE, for an R2ID whose RIAE is not trained yet."),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(min=0, help="Number of classes, for an R2ID whose shards do not exist yet."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Estimate what training needs: parameters, memory, FLOPs, micro-batch, days, workers, disk."""
    from r2id.training.communication import find_gpu
    from r2id.training.pipeline_plan import describe_config, plan_config

    given = {
        "memory": memory,
        "tflops": peak,
        "per_node": gpus_per_node,
        "intra_node": intra_node_bandwidth,
        "inter_node": inter_node_bandwidth,
    }
    result = plan_config(
        config,
        tuple(overrides or ()),
        gpus=gpus,
        gpu=find_gpu(gpu, **given),
        share=share,
        riae=riae,
        classes=classes,
    )
    report(result, as_json, describe_config)


@app.command(rich_help_panel="Training")
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of one stage, riae or r2id.")],
    overrides: Overrides = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Write a trace of ten steps to RUN/profile.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train one stage; continues if the run directory holds a checkpoint."""
    with left_at_a_signal():
        from r2id.training.loop import train as run_train

        settings = load_config(config, overrides or ())
        if isinstance(settings, PipelineRun):
            raise InputError(
                f"{config}: stage 'pipeline' is for r2id run; r2id train takes 'riae' or 'r2id'"
            )
        report_job(lambda: run_train(settings, profile=profile), as_json, _train_lines)


def _train_lines(figures: dict[str, Any]) -> list[str]:
    done = f"{figures['checkpoint']}: step {figures['step']}"
    if "skipped_steps" in figures:
        done += f" ({figures['skipped_steps']} skipped)"
    if "images_per_second" not in figures:
        return [f"{done}, already finished"]
    return [
        f"{done}, loss {figures.get('loss', math.nan):.4f}, "
        f"{figures['images_per_second']:.1f} images/s without previews and saving, "
        f"{figures['tokens_per_second']:.0f} tokens/s, "
        f"{figures['tflops_per_process']:.3g} TFLOP/s per process "
        f"({figures['mfu']:.1%} of matrix products), data wait {figures['data_wait']:.1%}, "
        f"{figures['memory_gib']:.2f} GiB"
    ]


@app.command(rich_help_panel="Training")
@with_fields
def encode(
    riae: Annotated[Path, typer.Option(metavar="CKPT", help="RIAE checkpoint or run directory.")],
    shards: Annotated[Path, typer.Option(help="Folder written by r2id prepare.")],
    out: Annotated[Path, typer.Option(help="Folder for the latent cache.")],
    settings: Annotated[Given, Fields(EncodeConfig)],
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode a dataset into a cache of latents; processes of torchrun share the work."""
    from r2id.training.encode import encode as run_encode

    config = build(EncodeConfig, settings)
    report_job(
        lambda: run_encode(riae, shards, out, **dict(config), device=find_device(device)),
        as_json,
        lambda r: [
            f"{r['out']}: {r['images']} images encoded"
            + (f", {r['reused']} found in place" if r["reused"] else "")
        ],
    )


@app.command(rich_help_panel="Training")
def run(
    config: Annotated[Path, typer.Argument(help="TOML file of a pipeline.")],
    overrides: Overrides = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline as a Prefect flow: prepare, train, encode, train, sample, evaluate."""
    from pipelines.pipeline import run_pipeline

    settings = load_config(config, overrides or ())
    if not isinstance(settings, PipelineRun):
        raise InputError(
            f"{config}: stage {settings.stage!r} is for r2id train; r2id run takes 'pipeline'"
        )
    result = run_pipeline(settings, config.parent)
    report(result, as_json, lambda r: r["lines"])
