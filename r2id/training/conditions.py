"""What an R2ID is told of an image: which of a shard set's facts, and how many of them there are.

Shape letters: B batch · A attributes · D width of an embedding · T its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from r2id.config import R2idRun
from r2id.data.shards import ShardSet
from r2id.errors import InputError


def known_conditions(config: R2idRun, shards: ShardSet) -> dict[str, Any]:
    """How many classes or attributes the model is to know, and the names of the attributes or the shape of embeddings.

    InputError when the set has none of what the config asks for."""
    kind, names, shape = (
        config.r2id.condition,
        shards.manifest.attribute_names,
        shards.manifest.embedding_shape,
    )
    if (kind == "attributes" and not names) or (kind == "embedding" and not shape):
        raise InputError(f"r2id.condition = {kind!r}: {shards.folder} has none")
    if kind == "attributes":
        return {"classes": len(names), "attributes": names}
    if kind == "embedding":
        return {"classes": 0, "embedding": shape}
    return {"classes": shards.num_classes if kind == "class" else 0}


def conditions_of(config: R2idRun, batch: Mapping[str, Tensor]) -> Tensor:
    """What a batch's images are to be drawn under: classes int64 [B] (−1: none), attributes int8 [B, A], or embeddings
    float16 [B, D] or [B, T, D]."""
    if config.r2id.condition in ("attributes", "embedding"):
        return batch[config.r2id.condition]
    return (
        batch["label"] if config.r2id.condition == "class" else torch.full_like(batch["label"], -1)
    )
