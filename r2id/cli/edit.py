"""Commands that edit pictures: upscale, vary, inpaint, outpaint, interpolate."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r2id.cli.fields import Fields, Given, with_fields
from r2id.cli.options import (
    Device,
    Json,
    Model,
    Overwrite,
    WithCodec,
    app,
    find_device,
    parse_window,
    report,
)
from r2id.config import PictureConfig, SamplerConfig
from r2id.config.arguments import parse_size
from r2id.errors import InputError

if TYPE_CHECKING:  # the commands' help needs neither torch nor Pillow
    from PIL import Image

    from r2id.pipeline import Pipeline

Picture = Annotated[Path, typer.Argument(metavar="IMAGE", help="Picture of any size.")]
Out = Annotated[Path, typer.Option(help="PNG file to write, or folder for it; must not exist.")]
Subject = Annotated[Given, Fields(PictureConfig)]
Settings = Annotated[Given, Fields(SamplerConfig, unset="the run's own")]


@app.command(rich_help_panel="Editing")
def upscale(
    checkpoint: WithCodec,
    image: Picture,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Height x width of the result in pixels.")
    ],
    out: Out,
    window: Annotated[
        str | None,
        typer.Option(
            metavar="y0,x0,y1,x1", help="Draw only this part, in pixels of the result of --size."
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Resize a picture, and add the detail that the autoencoder knows of larger ones."""
    from r2id.images import read_image
    from r2id.models.codec import Codec
    from r2id.pipeline import upscaled
    from r2id.sampling.pictures import to_picture

    codec = Codec.of_any(checkpoint, find_device(device))

    def edit() -> Image.Image:
        picture = read_image(image, codec.channels)
        return to_picture(upscaled(codec, picture, parse_size(size), parse_window(window)))

    _write(edit, out, overwrite, as_json)


@app.command(rich_help_panel="Editing")
@with_fields
def vary(
    checkpoint: Model,
    image: Picture,
    out: Out,
    subject: Subject,
    settings: Settings,
    strength: Annotated[
        float, typer.Option(help="How much is changed, above 0 and at most 1, which is all of it.")
    ] = 0.5,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height x width of the result in pixels. Default: the picture's own.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw a picture like another one."""
    _write(
        lambda: _load(checkpoint, device).vary(
            image, strength, size=parse_size(size) if size else None, **subject, **settings
        ),
        out,
        overwrite,
        as_json,
    )


@app.command(rich_help_panel="Editing")
@with_fields
def inpaint(
    checkpoint: Model,
    image: Picture,
    mask: Annotated[
        Path,
        typer.Argument(
            metavar="MASK", help="Picture of the same size, white where pixels are drawn anew."
        ),
    ],
    out: Out,
    subject: Subject,
    settings: Settings,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw a part of a picture anew, to fit the rest; other pixels stay as they are."""
    _write(
        lambda: _load(checkpoint, device).inpaint(image, mask, **subject, **settings),
        out,
        overwrite,
        as_json,
    )


@app.command(rich_help_panel="Editing")
@with_fields
def outpaint(
    checkpoint: Model,
    image: Picture,
    size: Annotated[
        str, typer.Option(metavar="HxW", help="Height x width of the result in pixels.")
    ],
    out: Out,
    subject: Subject,
    settings: Settings,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="y,x", help="Where the picture's top left corner goes. Default: in the middle."
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a picture beyond its borders, to a larger size; it stays as it is itself."""
    _write(
        lambda: _load(checkpoint, device).outpaint(
            image, parse_size(size), _parse_place(at), **subject, **settings
        ),
        out,
        overwrite,
        as_json,
    )


@app.command(rich_help_panel="Editing")
@with_fields
def interpolate(
    checkpoint: Model,
    seed: Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="Seed of the first picture.")],
    other: Annotated[int, typer.Argument(min=0, max=2**63 - 1, help="Seed of the last picture.")],
    out: Out,
    subject: Annotated[Given, Fields(PictureConfig, without=("seed",))],
    settings: Settings,
    count: Annotated[int, typer.Option(min=2, help="Number of pictures, in one row.")] = 8,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="HxW",
            help="Height x width of each picture. Default: that of the training images.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Draw pictures that go from one seed's to another's."""

    def draw() -> Image.Image:
        import torch

        from r2id.images import tile
        from r2id.sampling.pictures import to_picture

        pipe = _load(checkpoint, device)
        pictures = pipe.interpolate(
            seed, other, count, size=parse_size(size) if size else None, **subject, **settings
        )
        return to_picture(tile(torch.stack([*map(pipe.read, pictures)]), count, gap=0))

    _write(draw, out, overwrite, as_json)


def _load(checkpoint: str, device: str) -> Pipeline:
    from r2id.pipeline import Pipeline

    return Pipeline.from_pretrained(checkpoint, device=find_device(device))


def _parse_place(text: str | None) -> tuple[int, int] | None:
    """Read a place: '0,8' → (0, 8). Raises InputError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]+),([0-9]+)", text.replace(" ", ""))
    if not match:
        raise InputError(f"--at {text!r}: must be y,x in whole pixels of the result, such as 0,8")
    return int(match[1]), int(match[2])


def _write(edit: Callable[[], Image.Image], out: Path, overwrite: bool, as_json: bool) -> None:
    """Make a picture, and write it to a PNG file, which is checked first."""
    from r2id.data.records import png_bytes
    from r2id.files import write_atomic
    from r2id.sampling.grids import output_files

    (file,) = output_files(out, ["picture"], overwrite)
    picture = edit()
    write_atomic(file, png_bytes(picture))
    result = {"file": str(file), "size": [picture.height, picture.width]}
    report(result, as_json, lambda r: [r["file"]])
