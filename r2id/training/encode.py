"""``r2id encode``: encoding a whole dataset with a trained RIAE, into a cache for R2ID."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r2id import dist
from r2id.config import DataConfig
from r2id.data.latent_writer import LatentWriter
from r2id.data.latents import Dtype
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.images import to_float
from r2id.models.codec import Codec
from r2id.progress import Progress


def encode(
    riae: Path,
    shards: Path,
    out: Path,
    *,
    batch: int = 256,
    workers: int | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Encode every image of the shards and write the latents to the cache ``out``.

    Images are prepared as for the RIAE's training, but whole, not in windows; if it was trained on
    mirrored images, each is encoded mirrored too. Shards that an earlier call has finished are
    kept. In a job of several processes (torchrun) each encodes its share of the shards, on its own
    device. Returns the folder, the number of images and how many of them were kept. Raises
    InputError when the RIAE, the shards and the cache do not fit together. ``workers``: see
    EncodeConfig.
    """
    world = dist.init()
    codec = Codec.load(riae, world.device if world.world_size > 1 else device)
    data_set = ShardSet.open(shards)
    data = codec.data.model_copy(update={"shards": shards})
    if workers is not None:
        data = data.model_copy(update={"workers": workers})
    writer = LatentWriter(
        out,
        data_set,
        data,
        codec_hash=codec.identity,
        codec_path=codec.name,
        latent_channels=codec.latent_channels,
        dtype=dtype,
    )
    with dist.exclusive(out):
        if dist.is_main():
            writer.prepare()
        dist.barrier()
        images = sum(split.samples for split in data_set.manifest.splits.values())
        missing = _find_missing(data_set, writer)
        reused = images - sum(map(len, missing.values()))
        # What is missing is shared out, not everything: else the ranks whose shards are there would
        # wait for those whose shards are not.
        mine = dict(list(missing.items())[dist.rank() :: dist.world_size()])
        _encode_shards(codec, data_set, data, writer, batch, mine, reused)
        dist.barrier()  # until every rank has written
        if dist.is_main():
            writer.finish()
        dist.barrier()
    return {
        "out": str(out),
        "images": images,
        "reused": reused,
        "codec": codec.name,
        "codec_hash": codec.identity,
    }


Missing = dict[tuple[str, int], np.ndarray]
"""(Split, shard number) → the samples of the shard."""


def _find_missing(data_set: ShardSet, writer: LatentWriter) -> Missing:
    """List the shards whose latents are not cached yet, in the set's order, on every rank.

    Every rank must call it: they share the work, because what is there is hashed.
    """
    shards = [
        (split, number) for split, files in writer.files.items() for number in range(len(files))
    ]
    share = shards[dist.rank() :: dist.world_size()]
    found = dist.gather_objects([shard for shard in share if not writer.done(*shard)])
    missing = {shard for part in found for shard in part}
    return {
        (split, number): data_set.split(split).indices_in_shard(number)
        for split, number in shards
        if (split, number) in missing
    }


def _encode_shards(
    codec: Codec,
    data_set: ShardSet,
    data: DataConfig,
    writer: LatentWriter,
    batch: int,
    shards: Missing,
    reused: int,
) -> None:
    """Encode and write the latents of some shards; ``reused`` images were there already."""
    total = reused + sum(map(len, shards.values()))
    shown = dist.is_main()
    with Progress("encode", total, start=reused, unit="images", shown=shown) as progress:
        for (split, number), indices in shards.items():
            # Latents of other images would be taken for those of this set from then on.
            data_set.split(split).check_content(number)
            # Batches are grouped by image size, but the cache keeps the order of the shard's index.
            latents: dict[int, Tensor] = {}
            for part in eval_loader(data_set, data, split, batch, indices=indices, as_float=False):
                # Bytes are a quarter of what floats are to copy, and pinned for it.
                images = to_float(part["image"].to(codec.device, non_blocking=True))
                encoded = codec.encode(images)
                if data.flip:
                    encoded = torch.stack([encoded, codec.encode(images.flip(-1))], dim=1)
                latents.update(zip(part["index"].tolist(), encoded.cpu(), strict=True))
                progress.advance(len(part["index"]))
            writer.write(split, number, [latents[int(index)] for index in indices])
