"""Commands about datasets: prepare, verify, data stats, data index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from r2id.cli.options import Json, app, parse_size, report
from r2id.errors import InputError

data_app = typer.Typer(
    no_args_is_help=True, help="Look at shard sets, and fetch the index of one that is elsewhere."
)
app.add_typer(data_app, name="data")


@app.command()
def prepare(
    dataset: Annotated[
        Literal["digits", "mnist", "celeba", "imagenet", "folder", "webdataset"],
        typer.Argument(
            help="digits: shipped, 8x8; mnist: IDX files; celeba; imagenet: tars, Kaggle, Parquet or folders; folder: any "
            "folder, tar or zip of images; webdataset: existing tars. NAME.npy beside an image of the last two is the "
            "embedding of its text."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    source: Annotated[
        Path | None, typer.Option(help="The dataset's files. Without it, mnist is downloaded.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    engine: Annotated[
        Literal["processes", "dask", "ray"], typer.Option(help="What writes the shards.")
    ] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Of a Dask or Ray cluster. Default: one is started here.")
    ] = None,
    shard_mb: Annotated[float, typer.Option(min=0.001, help="Largest shard in megabytes.")] = 256.0,
    labels: Annotated[
        Path | None, typer.Option(help="folder: CSV or Parquet of path, label and maybe split.")
    ] = None,
    label: Annotated[
        str, typer.Option(help="celeba: what the class is: none, identity or an attribute.")
    ] = "none",
    images: Annotated[
        Literal["aligned", "wild"], typer.Option(help="celeba: which images.")
    ] = "aligned",
    max_megapixels: Annotated[
        float, typer.Option(min=0.0001, help="Larger images are rejected.")
    ] = 100.0,
    max_rejects: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images that may be unusable.")
    ] = 0.01,
    as_json: Json = False,
) -> None:
    """Shard a dataset into webdataset tars at native sizes, with manifest, index and checksums."""
    from data_prep.prepare import prepare as run_prepare
    from r2id.config import PrepareConfig
    from r2id.data.shards import ShardSet

    if address and engine == "processes":
        raise InputError(f"address {address!r}: goes with --engine dask or ray")
    config = PrepareConfig(
        dataset=dataset,
        source=source,
        out=out,
        workers=workers,
        engine=engine,
        address=address,
        shard_mb=shard_mb,
        labels=labels,
        label=label,
        images=images,
        max_megapixels=max_megapixels,
        max_rejects=max_rejects,
    )
    if engine == "processes":
        run_prepare(config)
    else:
        from pipelines.preparation import prepare_on_cluster

        prepare_on_cluster(config)
    report(
        {"out": out, **ShardSet.open(out).summary()},
        as_json,
        lambda r: [
            f"{r['out']}: {', '.join(f'{n} {name}' for name, n in r['samples'].items())} images, "
            f"{r['shards']} shards, {r['classes']} classes, {r['rejects']} rejected"
        ],
    )


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder written by prepare or encode.")
    ],
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild damaged shards from the source.")
    ] = False,
    source: Annotated[
        Path | None, typer.Option(help="Where the source is now, when it has moved.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rehash and decode everything; exit 1 and a list when anything is damaged."""
    from data_prep.repair import repair as run_repair
    from r2id.data.latents import MANIFEST, verify_latents
    from r2id.data.shards import ShardSet
    from r2id.data.verify import verify as run_verify

    latents = (folder / MANIFEST).is_file()
    if source and not repair:
        raise InputError(f"source {source}: goes with --repair")
    if latents and repair:
        raise InputError(
            f"{folder}: latents are repaired by the r2id encode that wrote them: it rewrites what is damaged"
        )
    damages = verify_latents(folder) if latents else run_verify(folder)
    repaired = run_repair(folder, damages, source) if repair and damages else {}
    damages = run_verify(folder) if repaired else damages
    summary = {} if latents or damages else ShardSet.open(folder).summary()
    count = f"{sum(summary['samples'].values())} images " if summary else ""
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
def data_stats(
    shards: Annotated[Path, typer.Argument(help="Folder written by prepare.")],
    out: Annotated[
        Path | None, typer.Option(help="PNG of the sizes, replaced. Default: NAME-sizes.png here.")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="HxW", help="As data.size: resize every image to this.")
    ] = None,
    window: Annotated[
        str | None, typer.Option(metavar="HxW", help="As data.window: train on parts this large.")
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="As data.max_pixels: the largest area.")
    ] = 65536,
    batch: Annotated[int, typer.Option(min=1, help="As train.batch: samples per step.")] = 64,
    batch_pixels: Annotated[
        int | None, typer.Option(min=1, help="As data.batch_pixels: pixels per step.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Sizes, aspect ratios, classes, and the buckets that training would use with what each cuts off."""
    import numpy as np

    from r2id.config import DataConfig
    from r2id.data.plots import draw_sizes
    from r2id.data.shards import ShardSet
    from r2id.data.stats import describe_stats, split_stats

    opened = ShardSet.open(shards)
    data = DataConfig(
        shards=shards,
        size=parse_size(size) if size else None,
        max_pixels=max_pixels,
        window=parse_size(window) if window else None,
        batch_pixels=batch_pixels,
    )
    splits = {
        name: split_stats(opened, data, name, batch)
        for name, entry in opened.manifest.splits.items()
        if entry.samples
    }
    picture = out or Path(f"{shards.resolve().name}-sizes.png")
    samples = [opened.split(name) for name in splits]
    draw_sizes(
        *(np.concatenate([getattr(part, side) for part in samples]) for side in ("height", "width"))
    ).save(picture)
    report(
        {**opened.summary(), "splits": splits, "picture": picture},
        as_json,
        lambda r: [
            *(line for name in splits for line in describe_stats(name, splits[name])),
            f"picture: {picture}",
        ],
    )


@data_app.command("index")
def data_index(
    address: Annotated[
        str, typer.Argument(help="Folder or URL of a shard set: http, s3, … as fsspec has them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for its manifest and indexes.")],
    as_json: Json = False,
) -> None:
    """Fetch manifest and indexes of a shard set that is elsewhere: all that data.stream needs on disk."""
    from r2id.data.stream import fetch_index

    report(
        {"out": out, **fetch_index(address, out).summary()},
        as_json,
        lambda r: [
            f"{out}: index of {sum(r['samples'].values())} images; train with data.shards={out} "
            f"data.stream={address}"
        ],
    )
