"""Reconstruction: encoding a picture file and decoding it at any sizes, whole or in part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from r2id.checkpoints.trained import Trained
from r2id.images import psnr, read_image, save_png
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window, part_of
from r2id.progress import Progress
from r2id.sampling.grids import output_files
from r2id.sampling.memory import check_reconstruction

_SHOWN = 1 << 21
"""Pixels of a command from which on its progress is shown."""


def reconstruct_file(
    source: Trained | Path,
    picture: Path,
    out: Path,
    sizes: Sequence[Size],
    *,
    window: Window | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Encode a picture file, and decode it at every size (by default its own) into PNG files.

    With ``window`` (y0, x0, y1, x1), in pixels, only that part of each is decoded. ``out`` is a PNG
    file (for one size) or a folder. Returns the files, and the PSNR in dB of the whole picture at
    its own size. Raises InputError when the window does not lie within the picture at each size,
    when one would not fit into memory, and for an R2ID of pixels, which has no autoencoder.
    """
    codec = Codec.of_any(source, device)
    codec.check_riae("reconstruct")
    image = read_image(picture, codec.channels)
    own: Size = (image.shape[1], image.shape[2])
    sizes = tuple(dict.fromkeys(sizes)) or (own,)
    for size in sizes:
        # Before anything is computed or written.
        check_reconstruction(codec, codec.grid_for(own), size, window)
    files = output_files(out, [f"{height}x{width}" for height, width in sizes], overwrite)
    # Whole pictures at the picture's own size serve for the PSNR too.
    spare = window is None and own in sizes
    pixels = [math.prod(own), *(_pixels(size, window) for size in sizes)]
    total = sum(pixels) + (0 if spare else math.prod(own))
    with Progress("reconstruct", total, unit="pixels", shown=total >= _SHOWN) as progress:
        latents = codec.encode(image.unsqueeze(0), advance=progress.advance)
        error = None
        for file, size in zip(files, sizes, strict=True):
            decoded = codec.decode(latents, size, window, own, progress.advance)[0].cpu()
            save_png(decoded, file)
            if spare and size == own:
                error = F.mse_loss(decoded, image)
            del decoded  # before the next is made
        if error is None:
            decoded = codec.decode(latents, own, native=own, advance=progress.advance)[0].cpu()
            error = F.mse_loss(decoded, image)
    return {"files": [str(file) for file in files], "psnr": float(psnr(error))}


def _pixels(size: Size, window: Window | None) -> int:
    return math.prod(side.stop - side.start for side in part_of(size, window))
