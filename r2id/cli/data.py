"""Commands about datasets: prepare, verify, data stats, data index."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_prep.readers import DATASETS
from r2id.cli.fields import Fields, Given, with_fields
from r2id.cli.options import Json, app, report
from r2id.config import DataConfig, PrepareConfig, TrainConfig, build
from r2id.errors import InputError
from r2id.progress import counted

if TYPE_CHECKING:  # commands' help does not need it
    from r2id.data.shards import Split

data_app = typer.Typer(
    no_args_is_help=True, help="Describe shards, and fetch the index of shards that are elsewhere."
)
app.add_typer(data_app, name="data", rich_help_panel="Data")

_STATS_FIELDS = ("size", "window", "max_pixels", "batch_pixels")
"""Settings that the sizes of training's batches depend on."""


@app.command(rich_help_panel="Data")
@with_fields
def prepare(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET",
            help=". ".join(f"{name}: {dataset.about}" for name, dataset in DATASETS.items()) + ".",
        ),
    ],
    settings: Annotated[Given, Fields(PrepareConfig, without=("dataset",))],
    as_json: Json = False,
) -> None:
    """Write a dataset as shards: webdataset tars of images, with manifest, index and checksums."""
    from data_prep.prepare import prepare as run_prepare
    from r2id.data.shards import ShardSet

    config = build(PrepareConfig, {"dataset": dataset, **settings})
    if config.engine == "processes":
        run_prepare(config)
    else:
        from pipelines.preparation import prepare_on_cluster

        prepare_on_cluster(config)
    out = config.out
    report(
        {"out": out, **ShardSet.open(out).summary()},
        as_json,
        lambda r: [
            f"{r['out']}: {', '.join(f'{n} {name}' for name, n in r['samples'].items())} images, "
            f"{counted(r['shards'], 'shard')}, {counted(r['classes'], 'class', 'classes')}, "
            f"{r['rejects']} rejected"
        ],
    )


@app.command(rich_help_panel="Data")
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder written by r2id prepare or r2id encode.")
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild damaged shards from the source.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option(help="Where the source is now, if it has moved; for --repair.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check and decode all shards or latents of a folder; list what is damaged and exit with 1."""
    from data_prep.repair import repair as run_repair
    from r2id.data.latents import MANIFEST, verify_latents
    from r2id.data.shards import ShardSet
    from r2id.data.verify import verify as run_verify

    latents = (folder / MANIFEST).is_file()
    if source and not repair:
        raise InputError(f"source {source}: goes with --repair")
    if latents and repair:
        raise InputError(
            f"{folder}: latents are repaired by the r2id encode that wrote them: "
            "it rewrites what is damaged"
        )
    damages = verify_latents(folder) if latents else run_verify(folder)
    repaired = run_repair(folder, damages, source) if repair and damages else {}
    damages = run_verify(folder) if repaired else damages
    summary = {} if latents or damages else ShardSet.open(folder).summary()
    count = f"{counted(sum(summary['samples'].values()), 'image')} " if summary else ""
    lines = [str(damage) for damage in damages] or [f"{folder}: {count}intact"]
    report(
        {
            "intact": not damages,
            "damages": [vars(damage) for damage in damages],
            "repaired": repaired,
            **summary,
        },
        as_json,
        lambda r: [*(f"{file}: {done}" for file, done in repaired.items()), *lines],
    )
    if damages:
        raise typer.Exit(1)


@data_app.command("stats")
@with_fields
def data_stats(
    shards: Annotated[Path, typer.Argument(help="Folder written by r2id prepare.")],
    data: Annotated[Given, Fields(DataConfig, only=_STATS_FIELDS)],
    train: Annotated[Given, Fields(TrainConfig, only=("batch",))],
    out: Annotated[
        Path | None,
        typer.Option(
            help="PNG file for a plot of the sizes; replaced if it exists. Default: none is drawn."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show sizes, aspect ratios and classes, and the sizes that training crops images to."""
    from r2id.data.shards import ShardSet
    from r2id.data.stats import describe_stats, split_stats

    opened = ShardSet.open(shards)
    settings = build(DataConfig, {"shards": shards, **data})
    batch = build(TrainConfig, {"steps": 1, **train}).batch
    splits = {
        name: split_stats(opened, settings, name, batch)
        for name, entry in opened.manifest.splits.items()
        if entry.samples
    }
    if out:
        _draw_sizes([opened.split(name) for name in splits], out)
    report(
        {**opened.summary(), "splits": splits, "picture": out},
        as_json,
        lambda r: [
            *(line for name in splits for line in describe_stats(name, splits[name])),
            *([f"picture: {out}"] if out else []),
        ],
    )


def _draw_sizes(splits: list[Split], out: Path) -> None:
    import numpy as np

    from r2id.data.plots import draw_sizes
    from r2id.files import atomic_file

    drawn = draw_sizes(
        *(np.concatenate([getattr(part, side) for part in splits]) for side in ("height", "width"))
    )
    with atomic_file(out) as file:
        drawn.save(file, format="PNG")


@data_app.command("index")
def data_index(
    address: Annotated[
        str, typer.Argument(help="Folder or address (any that fsspec knows, such as http or s3).")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the manifest and the indexes.")],
    as_json: Json = False,
) -> None:
    """Fetch the manifest and indexes of shards that are elsewhere, to train with data.stream."""
    from r2id.data.stream import fetch_index

    report(
        {"out": out, **fetch_index(address, out).summary()},
        as_json,
        lambda r: [
            f"{out}: index of {counted(sum(r['samples'].values()), 'image')}; train with "
            f"data.shards={out} data.stream={address}"
        ],
    )
