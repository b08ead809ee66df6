"""Pair images with the text embeddings beside them: ``NAME.npy`` belongs to ``NAME.jpg``."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.items import digest_of
from data_prep.sources import Files, is_hidden, is_image
from r2id.data.embeddings import parse_npy
from r2id.data.manifest import Reject
from r2id.errors import InputError

_TRIED = 10  # the most embeddings that are read to learn the shape of all
NO_EMBEDDING = "no embedding beside it, and other images have one"

Read = Callable[[bytes, int], bytes]
"""Reads the bytes at a place of a source, given its length."""


@dataclass(frozen=True)
class PairedImages:
    """The images of a source, with their embeddings where there are any."""

    images: Files
    """With embeddings, a place is ``IMAGE\\0LENGTH\\0EMBEDDING``: the image's place, the length of
    the embedding's file and its place. No place itself contains a NUL. ``modified`` is the later
    time of both."""
    digest: str
    shape: list[int]
    """[D] or [T, D]; empty without embeddings."""


def is_image_or_embedding(name: str) -> bool:
    """Return whether to list a file: it is an image or a ``.npy`` file."""
    return is_image(name) or _is_embedding(name)


def pair_embeddings(path: Path, found: Files, read: Read) -> PairedImages:
    """Pair the images of a source with their embeddings.

    If any image has an embedding, images without one are rejected. Raises InputError when no
    embedding has a usable shape.
    """
    # An unusable embedding is not a reject of its own: its image is rejected for lack of one.
    found.rejects = [reject for reject in found.rejects if not _is_embedding(reject.source)]
    embeddings = found.part(_is_embedding)
    if not embeddings:
        return PairedImages(found, found.digest, [])
    images = found.part(is_image)
    images.rejects = found.rejects
    # For each image, the row of its embedding, or null.
    where = pc.index_in(_stems(images), value_set=_stems(embeddings))
    alone = len(embeddings) - len(where.drop_null().unique())
    images.skipped = found.skipped + Counter({".npy": alone})
    if where.null_count == len(images):
        return PairedImages(images, images.digest, [])
    without = images.table.filter(where.is_null())["name"].to_pylist()
    images.rejects += [Reject("", os.fsdecode(name), NO_EMBEDDING) for name in without]
    digest = digest_of([(images.digest.encode(), 0), (embeddings.digest.encode(), 0)])
    beside = embeddings.table.take(where.drop_null())
    kept = images.table.filter(where.is_valid())
    places = pc.binary_join_element_wise(
        kept["place"], beside["size"].cast(pa.string()).cast(pa.binary()), beside["place"], b"\0"
    )
    modified = pc.max_element_wise(kept["modified"], beside["modified"])
    for name, column in (("place", places), ("modified", modified)):
        kept = kept.set_column(kept.column_names.index(name), name, column)
    images.table = kept
    return PairedImages(images, digest, common_shape(path, beside["size"], beside["place"], read))


def common_shape(
    path: Path, sizes: pa.ChunkedArray, places: pa.ChunkedArray, read: Read
) -> list[int]:
    """Return the shape of the embeddings: that of a readable one of the most common length."""
    common = pc.mode(sizes)[0]["mode"]
    problem = ""
    for place in islice(places.filter(pc.equal(sizes, common)).to_pylist(), _TRIED):
        try:
            shape = list(parse_npy(read(place, common.as_py())).shape)
        except ValueError as error:
            problem = problem or str(error)
            continue
        if len(shape) in (1, 2) and 0 not in shape:
            return shape
        problem = problem or f"of shape {shape}; must be [D] or [T, D]"
    raise InputError(
        f"source {path}: the .npy files beside its images are no embeddings: {problem}"
    )


def split_place(place: bytes) -> tuple[bytes, tuple[bytes, int] | None]:
    """Split a place into the image's place and, if any, the embedding's (place, length)."""
    image, _, rest = place.partition(b"\0")
    size, _, embedding = rest.partition(b"\0")
    return image, (embedding, int(size)) if rest else None


def _is_embedding(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() == ".npy" and not is_hidden(name)


def _stems(files: Files) -> pa.Array:
    """Return the files' names without their suffixes."""
    return pa.array([os.fsencode(entry.name.rpartition(".")[0]) for entry in files], pa.binary())
