"""Sheets of pictures with captions: rows of images, enlarged, each under a line of text."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from r2id.files import write_atomic
from r2id.images import read_image, to_bytes
from r2id.models.coords import Size

_SHORTER_SIDE = 48  # of a small image when it is enlarged
_TEXT, _LINE, _MARGIN = 14, 22, 6  # height of the letters, of a line, and the margin, in pixels


@dataclass(frozen=True)
class Row:
    """A row of images under its caption."""

    caption: str
    picture: Tensor
    """Float [C, H, W] in [−1, 1], C 1 or 3."""
    scale: int
    """How many pixels of the sheet one pixel is wide and high."""


def enlargement(size: Size) -> int:
    """Return the scale at which images of a size (H, W) can be seen well."""
    return max(1, math.ceil(_SHORTER_SIDE / min(size)))


def save_sheet(title: str, rows: Sequence[Row], file: Path) -> Path:
    """Write a title and rows as a PNG file, black on white; return its path."""
    font = ImageFont.load_default(_TEXT)
    pictures = [_enlarged(row) for row in rows]
    widths = [math.ceil(font.getlength(text)) for text in (title, *(row.caption for row in rows))]
    width = max(*widths, *(picture.width for picture in pictures)) + 2 * _MARGIN
    height = sum(picture.height + _LINE + _MARGIN for picture in pictures) + _LINE + 2 * _MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN), title, "black", font)
    top = _MARGIN + _LINE
    for row, picture in zip(rows, pictures, strict=True):
        draw.text((_MARGIN, top + 4), row.caption, "dimgray", font)
        sheet.paste(picture, (_MARGIN, top + _LINE))
        top += _LINE + picture.height + _MARGIN
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    write_atomic(file, buffer.getvalue())
    return file


def read_row(file: Path) -> Tensor:
    """Read the picture of a row, in colour, from a file."""
    return read_image(file, 3)


def _enlarged(row: Row) -> Image.Image:
    picture = Image.fromarray(to_bytes(row.picture).squeeze(-1).cpu().numpy()).convert("RGB")
    size = (picture.width * row.scale, picture.height * row.scale)
    return picture.resize(size, Image.Resampling.NEAREST)
