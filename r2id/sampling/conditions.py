"""Conditions of samples, made from what a user gives: labels, attributes or embeddings.

Shape letters: A attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from r2id.config import SampleConfig, change, find_labels
from r2id.data.embeddings import read_embeddings
from r2id.errors import InputError
from r2id.models.r2id import R2ID
from r2id.sampling.sampler import Sampler

if TYPE_CHECKING:  # it loads pyarrow, which nothing else in sampling needs
    from r2id.data.shards import ShardSet


def resolve(sampler: Sampler, **given: Any) -> SampleConfig:
    """Return the settings of samples: those that are given, and the run's own for all others.

    A setting that is None or empty is not given. Raises InputError when one is not allowed.
    """
    changes = {name: value for name, value in given.items() if value not in (None, ())}
    return change(sampler.defaults, changes)


def choose_labels(
    labels: Sequence[int | str], count: int, classes: int, names: Sequence[str] = ()
) -> Tensor:
    """Choose ``count`` labels: the given ones in turn, or else all classes in turn → int64 [count].

    They are all −1 (none) when the model has no classes. ``names`` are those of the classes. Raises
    InputError for a label that is none of them, and for more labels than samples.
    """
    if len(labels) > count:
        raise InputError(f"{len(labels)} labels: must be at most {count}, the number of samples")
    choices = find_labels(labels, classes, names) or list(range(classes)) or [-1]
    return torch.tensor([choices[i % len(choices)] for i in range(count)], dtype=torch.int64)


def spread_labels(count: int, classes: int) -> Tensor:
    """Choose ``count`` labels that stand for all classes → int64 [count], −1 without classes.

    Classes take turns; where there are more classes than labels, evenly spaced ones are taken, not
    the first: those of a data set are often alike.
    """
    if count < classes:
        return torch.arange(count) * classes // count
    return choose_labels((), count, classes)


def draw_conditions(
    sampler: Sampler, shards: ShardSet, split: str, count: int, seed: int
) -> Tensor | None:
    """Return the attributes or embeddings of ``count`` test images, drawn at random by a seed.

    All of them in that order, if there are fewer. None for a model of other conditions, and for
    shards without them.
    """
    kind = sampler.model.config.condition
    known = (
        getattr(shards.split(split), kind, None) if kind in ("attributes", "embedding") else None
    )
    if known is None:
        return None
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    return torch.from_numpy(known[order[:count].numpy()])


def choose_condition(
    sampler: Sampler, labels: Tensor, attributes: Sequence[str] = (), embedding: Path | None = None
) -> Tensor:
    """Return the condition of samples: attributes or embeddings if given, or else their labels.

    See choose_attributes and choose_embeddings; labels are int64 [count] → [count, …]. Raises
    InputError when both are given.
    """
    if attributes and embedding is not None:
        raise InputError("--attribute and --embedding exclude each other: samples have either")
    if attributes:
        return choose_attributes(attributes, sampler.attributes).expand(len(labels), -1)
    if embedding is not None:
        return choose_embeddings(embedding, sampler.model, len(labels))
    return labels


def choose_attributes(wanted: Sequence[str], names: Sequence[str]) -> Tensor:
    """Turn attributes such as ``["Smiling", "-Male"]`` into a condition → float32 [A].

    It is 1 for a name (with the attribute), −1 for a name after a minus (without it), and 0
    (either) for names that are not given. ``names`` are those of the model's attributes, in order.
    Raises InputError for other names, and for a name both with and without a minus.
    """
    chosen = torch.zeros(len(names))
    for word in wanted:
        name = word.removeprefix("-")
        if not names:
            raise InputError(f"attribute {name!r}: the model was not trained with attributes")
        if name not in names:
            raise InputError(f"attribute {name!r}: must be one of {', '.join(names)}")
        if name in wanted and f"-{name}" in wanted:
            raise InputError(f"attribute {name!r}: is given with and without a minus; must be one")
        chosen[list(names).index(name)] = -1.0 if word.startswith("-") else 1.0
    return chosen


def choose_embeddings(file: Path, model: R2ID, count: int) -> Tensor:
    """Read embeddings from a ``.npy`` file, and repeat them in turn → float16 [count, …].

    Raises InputError when the model was trained without embeddings, or with another shape of them,
    and for more embeddings than samples.
    """
    if model.config.condition != "embedding":
        raise InputError(f"embedding {file}: the model was not trained with embeddings")
    embeddings = torch.from_numpy(read_embeddings(file, model.condition_shape))
    if len(embeddings) > count:
        raise InputError(
            f"embedding {file}: {len(embeddings)} embeddings: must be at most {count}, the number "
            "of samples"
        )
    return embeddings[torch.arange(count) % len(embeddings)]
