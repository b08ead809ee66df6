"""Drawing samples into PNG files: a grid of samples for each size."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from r2id.checkpoints.trained import Trained
from r2id.errors import InputError
from r2id.images import save_png, tile
from r2id.models.coords import Size
from r2id.progress import Progress, say
from r2id.sampling.conditions import choose_condition, choose_labels, resolve
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler
from r2id.sampling.steps import Watch

_OTHER_PICTURES = frozenset({".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
"""Endings of picture files that are not written."""


def draw_grids(
    source: Trained | Path,
    out: Path,
    sizes: Sequence[Size],
    *,
    labels: Sequence[int | str] = (),
    attributes: Sequence[str] = (),
    embedding: Path | None = None,
    count: int | None = None,
    seed: int | None = None,
    grid: Size | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> dict[str, Any]:
    """Draw samples of a checkpoint at every size, and write a PNG file with a grid for each size.

    ``out`` is a PNG file (for one size) or a folder. ``attributes`` are names, see
    choose_attributes; ``embedding`` is a ``.npy`` file, see choose_embeddings. ``settings`` are
    those of Sampler.sample. Settings that are not given are the run's own, from [sample] in its
    config. Seeds and conditions are the same at every size, so that sample i shows the same
    composition at all of them.

    Returns the files, labels with the names of their classes, seeds and latent grids. Raises
    InputError before anything is drawn when a request cannot be met.
    """
    sampler = Sampler.load(source, device)
    wanted = resolve(
        sampler, sizes=tuple(sizes), labels=tuple(labels), count=count, seed=seed, **settings
    )
    sizes = tuple(dict.fromkeys(wanted.sizes)) or (sampler.codec.image,)
    for size in sizes:
        check_samples(sampler, size, grid, wanted.count)
    files = output_files(out, [f"{height}x{width}" for height, width in sizes], overwrite)
    classes, names = sampler.num_classes, sampler.class_names
    chosen_labels = choose_labels(wanted.labels, wanted.count, classes, names)
    condition = choose_condition(sampler, chosen_labels, attributes, embedding)
    for size in sizes:
        say_smaller_grid(sampler, size, grid)
    seeds = wanted.seed + torch.arange(wanted.count)
    # One column per class (ten without classes), so that each row shows every class once.
    columns = min(len(chosen_labels), classes or 10)
    grids = [sampler.diffused_grids(size, grid) for size in sizes]
    batches = (sampler.batches(wanted.count, latents) for latents in chain(*grids))
    with Progress("sample", wanted.steps * sum(batches)) as progress:
        for file, size in zip(files, sizes, strict=True):
            images = sampler.sample(
                condition, seeds, size, grid=grid, watch=_counting(progress), **settings
            )
            save_png(tile(images, columns), file)
    return {
        "files": [str(file) for file in files],
        "labels": chosen_labels.tolist(),
        "class_names": [names[one] if one >= 0 else None for one in chosen_labels.tolist()],
        "seeds": seeds.tolist(),
        "grids": [list(diffused[-1]) for diffused in grids],
    }


def say_smaller_grid(sampler: Sampler, size: Size, grid: Size | None) -> None:
    """Say it if pictures of a size (H, W) are drawn on fewer cells than they have by themselves.

    Cells are pixels where R2ID diffuses these. ``grid`` is the one that was asked for; with one,
    nothing is said.
    """
    own, used = sampler.codec.grid_for(size), sampler.grid_for(size)
    if grid is None and own[0] * own[1] > sampler.areas[1]:
        cells = "latent cells" if sampler.codec.riae else "pixels"
        say(
            f"{size[0]}x{size[1]}: drawn on {used[0]}x{used[1]} {cells} instead of "
            f"{own[0]}x{own[1]}, because training saw no larger grids; --grid asks for others"
        )


def _counting(progress: Progress) -> Watch:
    """Return a watch of one size that advances the progress of all sizes."""
    before = progress.done
    return lambda step: progress.advance(before + step.number - progress.done)


def output_files(out: Path, names: Sequence[str], overwrite: bool) -> list[Path]:
    """Choose a file for each name: ``out`` if it ends in .png, or else NAME.png in that folder.

    Raises InputError when a file exists already, when several pictures would go into one file, and
    for the name of a picture file that is no PNG, unless it is an existing folder's.
    """
    if out.suffix.lower() == ".png":
        if len(names) > 1 and not out.is_dir():
            raise InputError(
                f"--out {out}: is one file, and there are {len(names)} sizes; name a folder"
            )
        files = [out]
    elif out.is_file() or (out.suffix.lower() in _OTHER_PICTURES and not out.is_dir()):
        raise InputError(f"--out {out}: must be a .png file or a folder")
    else:
        files = [out / f"{name}.png" for name in dict.fromkeys(names)]
    for file in files:
        if file.is_dir():
            raise InputError(f"{file}: is a folder; choose another --out")
        if file.exists() and not overwrite:
            raise InputError(f"{file}: exists already; choose another --out or add --overwrite")
    return files
