"""Grids of samples in PNG files, one per size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints import Checkpoint
from r2id.errors import InputError
from r2id.images import save_png, tile
from r2id.models.coords import Size
from r2id.sampling.conditions import choose_attributes, choose_embeddings, choose_labels
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler


def draw_grids(
    source: Checkpoint | Path,
    out: Path,
    sizes: Sequence[Size],
    *,
    labels: Sequence[int] = (),
    attributes: Sequence[str] = (),
    embedding: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
    grid: Size | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Sample a checkpoint at every size, and write one PNG file with a grid of samples for each.

    ``out`` is a PNG file (for one size) or a folder. ``embedding`` is a ``.npy`` file, see
    choose_embeddings. ``settings`` are those of Sampler.sample. What is not given is the run's own
    setting, from its config's [sample]. Seeds and conditions are the same at every size, so that
    sample i shows one composition at all of them.
    Returns files, labels, seeds and latent grids. Raises InputError for what cannot be drawn,
    before anything is drawn.
    """
    sampler = Sampler.load(source, device)
    sizes = tuple(sizes) or sampler.defaults.sizes or (sampler.codec.image,)
    for size in sizes:
        check_samples(sampler, size, grid, count or sampler.defaults.count)
    files = output_files(out, [f"{height}x{width}" for height, width in sizes], overwrite)
    chosen = choose_labels(
        labels or sampler.defaults.labels, count or sampler.defaults.count, sampler.num_classes
    )
    condition = (
        choose_attributes(attributes, sampler.attributes).expand(len(chosen), -1)
        if attributes
        else chosen
    )
    if embedding is not None:
        condition = choose_embeddings(embedding, sampler.model, len(chosen))
    first = sampler.defaults.seed if seed is None else seed
    seeds = torch.arange(first, first + len(chosen))
    columns = min(len(chosen), sampler.num_classes or 10)
    for file, size in zip(files, sizes, strict=True):
        images = sampler.sample(condition, seeds, size, grid=grid, **settings)
        save_png(tile(images, columns), file)
    return {
        "files": [str(file) for file in files],
        "labels": chosen.tolist(),
        "seeds": seeds.tolist(),
        "grids": [list(grid or sampler.grid_for(size)) for size in sizes],
    }


def output_files(out: Path, names: Sequence[str], overwrite: bool) -> list[Path]:
    """Choose a file per name: ``out`` itself if it ends in .png, else NAME.png in that folder.

    Raises InputError when a file exists already, or when several pictures would go into one file.
    """
    if out.suffix.lower() == ".png":
        if len(names) > 1:
            raise InputError(
                f"--out {out}: is one file, and there are {len(names)} sizes; name a folder"
            )
        files = [out]
    elif out.suffix:
        raise InputError(f"--out {out}: must be a .png file or a folder")
    else:
        files = [out / f"{name}.png" for name in dict.fromkeys(names)]
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"{file}: exists already; choose another --out or add --overwrite")
    if out.is_file() and not out.suffix:
        raise InputError(f"--out {out}: is a file; must be a .png file or a folder")
    return files
