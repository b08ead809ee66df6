"""The conditions of an R2ID: which facts of a shard set it is given, and how many there are.

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
    """Return what the model must know of its conditions to be built.

    ``classes`` is the number of classes or attributes; ``attributes`` are their names, or
    ``embedding`` the shape of embeddings, where those are the condition. Raises InputError when the
    set has none of what the config asks for.
    """
    kind = config.r2id.condition
    names, shape = shards.manifest.attribute_names, shards.manifest.embedding_shape
    if (kind == "attributes" and not names) or (kind == "embedding" and not shape):
        raise InputError(f"r2id.condition = {kind!r}: {shards.folder} has none")
    if kind == "attributes":
        return {"classes": len(names), "attributes": names}
    if kind == "embedding":
        return {"classes": 0, "embedding": shape}
    return {"classes": shards.num_classes if kind == "class" else 0}


def conditions_of(config: R2idRun, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the conditions of a batch's images.

    Classes int64 [B] (−1: none), attributes int8 [B, A], or embeddings float16 [B, D] or [B, T, D].
    """
    kind = config.r2id.condition
    if kind in ("attributes", "embedding"):
        return batch[kind]
    return batch["label"] if kind == "class" else torch.full_like(batch["label"], -1)
