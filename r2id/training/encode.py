"""Latents of a whole dataset by a trained RIAE, into a cache that R2ID trains from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r2id.data.latents import LatentWriter
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.progress import Progress
from r2id.training.codec import Codec


def encode(riae: Path, shards: Path, out: Path, *, batch: int = 256, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Encode every image as it was prepared for the RIAE's training; what an earlier run finished is kept.

    Returns the folder, the number of images and how many of them were found in place. InputError when the RIAE, the
    shards or what is at ``out`` do not fit.
    """
    codec, data_set = Codec.load(riae, device), ShardSet.open(shards)
    data = codec.data.model_copy(update={"shards": shards})
    writer = LatentWriter(out, data_set, data, codec_hash=codec.hash, codec_path=codec.path,
                          latent_channels=codec.latent_channels)
    total = sum(split.samples for split in data_set.manifest.splits.values())
    reused = 0
    with Progress("encode", total, unit="images") as progress:
        for name, entry in data_set.manifest.splits.items():
            samples = data_set.split(name)
            for number in range(len(entry.shards)):
                members = samples.in_shard(number)
                if writer.done(name, number):
                    reused += len(members)
                    progress.advance(len(members))
                    continue
                # Batches come by size, the cache is in the index's order.
                latents: dict[int, Tensor] = {}
                for part in eval_loader(data_set, data, name, batch, indices=members):
                    latents.update(zip(part["index"].tolist(), codec.encode(part["image"]).cpu(), strict=True))
                    progress.advance(len(part["index"]))
                writer.write(name, number, [latents[int(index)] for index in members])
    writer.finish()
    return {"out": str(out), "images": total, "reused": reused, "codec": str(codec.path), "codec_hash": codec.hash}
