"""Reconstruction: encoding a picture file and decoding it at any sizes, whole or in part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from r2id.checkpoints import Checkpoint
from r2id.images import psnr, read_image, save_png
from r2id.models.codec import Codec
from r2id.models.coords import Size, Window, part_of
from r2id.sampling.grids import output_files
from r2id.sampling.memory import check_reconstruction


def reconstruct_file(
    source: Checkpoint | Path,
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
    its own size. Raises InputError when the window does not lie within the picture at each size, or
    when one would not fit into memory.
    """
    codec = Codec.load(source, device)
    image = read_image(picture, codec.channels)
    own: Size = (image.shape[1], image.shape[2])
    sizes = tuple(sizes) or (own,)
    for size in sizes:
        part_of(size, window)  # before anything is computed or written
        check_reconstruction(codec, codec.grid_for(own), size, window)
    files = output_files(out, [f"{height}x{width}" for height, width in sizes], overwrite)
    latents = codec.encode(image.unsqueeze(0))
    for file, size in zip(files, sizes, strict=True):
        save_png(codec.decode(latents, size, window, own)[0], file)
    error = F.mse_loss(codec.decode(latents, own)[0].cpu(), image)
    return {"files": [str(file) for file in files], "psnr": float(psnr(error))}
