"""What commands share: the app, common options, and the printing of results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r2id import __version__
from r2id.config.arguments import parse_size
from r2id.errors import InputError, Stopped

if TYPE_CHECKING:  # commands that need no torch start without it
    import torch

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Resolution-invariant image generation. Sizes are always height x width.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Settings that override the file's, as section.key=value, such as train.steps=500.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at --out.")]
SizeList = Annotated[
    list[str] | None,
    typer.Option(
        "--size", metavar="HxW", help="Height x width of the picture in pixels. May be repeated."
    ),
]
MODEL = (
    "run directory, checkpoint, exported file or folder, or owner/name on the Hugging Face Hub "
    "(owner/name@revision)."
)
"""What commands take as a trained model, in their help."""
Model = Annotated[str, typer.Argument(metavar="CKPT", help=f"R2ID: {MODEL}")]
WithCodec = Annotated[Path, typer.Argument(metavar="CKPT", help=f"R2ID or RIAE: {MODEL}")]
Device = Annotated[
    str, typer.Option(help="Device: cpu, cuda, or auto, which takes a GPU if there is one.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"r2id {__version__}")
        raise typer.Exit


@app.callback()
def accept_global_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Accept the options that stand before a command; the one there is ends the program."""


def parse_sizes(texts: list[str] | None) -> tuple[tuple[int, int], ...]:
    """Read the sizes of a repeated option; none if it was not given."""
    return tuple(parse_size(text) for text in texts or ())


def parse_window(text: str | None) -> tuple[int, int, int, int] | None:
    """Read a window: '0,8,32,40' → (0, 8, 32, 40). Raises InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+),([0-9]+),([0-9]+),([0-9]+)", text.replace(" ", ""))
    if not match:
        raise InputError(
            f"window {text!r}: must be y0,x0,y1,x1 in whole pixels of the picture of --size, "
            "such as 0,8,32,40"
        )
    return int(match[1]), int(match[2]), int(match[3]), int(match[4])


def find_device(name: str) -> torch.device:
    """Find a device; ``auto`` is CUDA if there is a GPU. Raises InputError if it is not usable."""
    from r2id import dist  # which loads PyTorch

    return dist.find_device(name)


def report_job(
    work: Callable[[], dict[str, Any]], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Do this process's part of a job, and print the result in the job's first process.

    After an error the process stays in its group, which the others may not leave: see cli.main.
    That the job was stopped, the first process says for all.
    """
    from r2id import dist

    try:
        result, main_process = work(), dist.is_main()
    except Stopped:
        main_process = dist.is_main()
        dist.shutdown()  # as the others do, because they stop together
        if not main_process:
            raise typer.Exit(75) from None
        raise
    dist.shutdown()
    if main_process:
        report(result, as_json, lines)


def report(
    result: dict[str, Any], as_json: bool, lines: Callable[[dict[str, Any]], list[str]]
) -> None:
    """Print a result as one JSON object, or as lines for people."""
    print(json.dumps(result, default=str) if as_json else "\n".join(lines(result)))
