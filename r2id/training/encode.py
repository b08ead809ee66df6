"""Latents of a whole dataset by a trained RIAE, into a cache that R2ID trains from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.data.latent_writer import LatentWriter
from r2id.data.latents import Dtype
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.models.codec import Codec
from r2id.progress import Progress


def encode(
    riae: Path,
    shards: Path,
    out: Path,
    *,
    batch: int = 256,
    workers: int = 0,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Encode every image, whole, as it was prepared for the RIAE's training; what an earlier run finished is kept.

    In a job of several processes (torchrun) each takes its share of the shards, on its own device. Returns the folder, the
    number of images and how many of them were found in place. InputError when the RIAE, the shards or what is at ``out``
    do not fit.
    """
    world = dist.init()
    checkpoint = Checkpoint.open(riae)
    codec = Codec.load(checkpoint, world.device if world.world_size > 1 else device)
    data_set = ShardSet.open(shards)
    data = codec.data.model_copy(update={"shards": shards, "workers": workers})
    writer = LatentWriter(
        out,
        data_set,
        data,
        codec_hash=codec.identity,
        codec_path=checkpoint.path,
        latent_channels=codec.latent_channels,
        dtype=dtype,
    )
    if dist.is_main():
        writer.prepare()
    dist.barrier()
    mine = [
        (name, number)
        for name, entry in data_set.manifest.splits.items()
        for number in range(len(entry.shards))
    ][world.rank :: world.world_size]
    members = {shard: data_set.split(shard[0]).indices_in_shard(shard[1]) for shard in mine}
    reused = 0
    with Progress(
        "encode", sum(map(len, members.values())), unit="images", shown=dist.is_main()
    ) as progress:
        for (name, number), indices in members.items():
            if writer.done(name, number):
                reused += len(indices)
                progress.advance(len(indices))
                continue
            # Batches come by size, the cache is in the index's order.
            latents: dict[int, Tensor] = {}
            for part in eval_loader(data_set, data, name, batch, indices=indices):
                latents.update(
                    zip(part["index"].tolist(), codec.encode(part["image"]).cpu(), strict=True)
                )
                progress.advance(len(part["index"]))
            writer.write(name, number, [latents[int(index)] for index in indices])
    reused = int(
        dist.all_reduce_sum(torch.tensor(reused, device=world.device))
    )  # and all have written
    if dist.is_main():
        writer.finish()
    dist.barrier()
    total = sum(split.samples for split in data_set.manifest.splits.values())
    return {
        "out": str(out),
        "images": total,
        "reused": reused,
        "codec": str(checkpoint.path),
        "codec_hash": codec.identity,
    }
