"""The conditions of an R2ID: what its shards say about images that it is conditioned on.

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


def condition_facts(config: R2idRun, shards: ShardSet) -> dict[str, Any]:
    """Return the facts of the conditions that are needed to build and use the model.

    ``classes`` is the number of classes or attributes (0: neither). ``class_names`` or
    ``attributes`` holds their names, ``embedding`` the shape of one embedding, where these are the
    condition. Raises InputError when the shards lack what ``r2id.condition`` asks for.
    """
    kind = config.r2id.condition
    names, shape = shards.manifest.attribute_names, shards.manifest.embedding_shape
    if (kind == "attributes" and not names) or (kind == "embedding" and not shape):
        raise InputError(f"r2id.condition = {kind!r}: the shards in {shards.folder} have none")
    if kind == "attributes":
        return {"classes": len(names), "attributes": names}
    if kind == "embedding":
        return {"classes": 0, "embedding": shape}
    if kind == "class":
        return {"classes": shards.num_classes, "class_names": shards.class_names}
    return {"classes": 0}


def conditions_of(config: R2idRun, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the conditions of a batch's images.

    Classes int64 [B] (−1: none), attributes int8 [B, A], or embeddings float16 [B, D] or [B, T, D].
    """
    kind = config.r2id.condition
    if kind in ("attributes", "embedding"):
        return batch[kind]
    return batch["label"] if kind == "class" else torch.full_like(batch["label"], -1)
