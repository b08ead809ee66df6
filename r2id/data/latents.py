"""The latent cache: latents of all images of a shard set, encoded by one RIAE; and its loader.

R2ID trains much faster when images are encoded once, not in every epoch. A cache is a folder::

    latents.json                       the RIAE, the data, how images were prepared, and all files;
                                       written last
    <split>/shard-000000.safetensors   "latents": [L, h, w] of all samples, concatenated flat, as
                                       float32, float16 or bfloat16; "heights" and "widths" of
                                       their grids: int64 [samples]
    <split>/shard-000000.json          identity, length and hash of that file: its commit marker

There is one file per image shard, with the samples in the order of the shard's index. A mirrored
cache, which is that of an RIAE trained on mirrored images (``data.flip``), holds of each image two
grids: its own and the mirrored image's. Latents are stored raw: the mean and standard deviation
they are normalised with belong to the RIAE checkpoint.

Shape letters: b micro-batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from safetensors import SafetensorError, safe_open

from r2id.config import DataConfig
from r2id.data.loader import MicroBatch, RankPlan, StepDataset, load_items, mirrored
from r2id.data.shards import ShardSet
from r2id.data.verify import Damage
from r2id.errors import InputError
from r2id.files import sha256_file
from r2id.progress import track

FORMAT_VERSION = 2
MANIFEST = "latents.json"
Dtype = Literal["float32", "float16", "bfloat16"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CacheIdentity(_Strict):
    """Everything that a cache's content depends on; a cache of another identity is refused."""

    format_version: int = FORMAT_VERSION
    codec_hash: str
    digest: str
    """ShardSet.digest of the images."""
    latent_channels: int
    channels: int
    size: tuple[int, int] | None
    max_pixels: int
    dtype: Dtype = "float32"
    mirrored: bool = False

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave ``mirrored`` out when it is false: the checksums of older manifests lack it."""
        fields = write(self)
        return fields if self.mirrored else {k: v for k, v in fields.items() if k != "mirrored"}


class LatentFile(_Strict):
    """The commit marker of one file of a cache; ``file`` is relative to the cache."""

    identity: CacheIdentity
    file: str
    samples: int
    bytes: int
    sha256: str


class LatentManifest(_Strict):
    """The content of latents.json."""

    identity: CacheIdentity
    codec: str
    """Path of the RIAE, for people only: codec_hash identifies it."""
    files: dict[str, list[LatentFile]]
    """The files of each split, in shard order."""
    checksum: str = ""

    def expected_checksum(self) -> str:
        """Hash all other fields, so that an edited manifest is noticed."""
        content = self.model_dump(exclude={"checksum"}, mode="json")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LatentSplit:
    """The latents of one split of N samples, memory-mapped."""

    flat: list[torch.Tensor]
    """For each shard, all values as stored."""
    start: np.ndarray
    """For each sample, the position in its shard's flat array where it begins; int64 [N]."""
    height: np.ndarray
    """For each sample, the height of its latent grid; int64 [N], as ``width``."""
    width: np.ndarray
    shard: np.ndarray
    """For each sample, the number of its shard; [N]."""
    identity: CacheIdentity
    flip: bool
    """Mirror samples with a probability of one half."""

    def __call__(
        self, indices: np.ndarray, _height: int, _width: int, rng_key: torch.Tensor
    ) -> torch.Tensor:
        """Read latents, float32 [b, L, h, w]. Samples of one bucket have grids of one size.

        The same samples are mirrored as when r2id.data.loader.ImageReader reads images.
        """
        grid = int(self.height[indices[0]]), int(self.width[indices[0]])
        count = self.identity.latent_channels * grid[0] * grid[1]
        starts = self.start[indices]
        if self.flip:
            starts = starts + count * mirrored(rng_key, indices)
        parts = [
            self.flat[self.shard[i]][start : start + count]
            for i, start in zip(indices, starts, strict=True)
        ]
        latents = torch.stack(parts).float()
        return latents.reshape(len(indices), self.identity.latent_channels, *grid)


@dataclass(frozen=True)
class LatentCache:
    """An open latent cache."""

    folder: Path
    manifest: LatentManifest

    @classmethod
    def open(cls, folder: Path, expect_codec_hash: str, expect_digest: str) -> LatentCache:
        """Open a cache; InputError when it is unfinished, or of another RIAE or other data."""
        manifest = read_latents(folder)
        expected = manifest.identity.model_copy(
            update={
                "format_version": FORMAT_VERSION,
                "codec_hash": expect_codec_hash,
                "digest": expect_digest,
            }
        )
        if manifest.identity != expected:
            raise InputError(
                f"{folder}: {describe_difference(manifest.identity, expected)}: run r2id encode "
                "again, into another folder"
            )
        return cls(folder, manifest)

    def check(self, data: DataConfig) -> None:
        """Raise InputError when the images were prepared with other settings than these."""
        expected = self.manifest.identity.model_copy(
            update={"channels": data.channels, "size": data.size, "max_pixels": data.max_pixels}
        )
        if self.manifest.identity != expected:
            raise InputError(
                f"{self.folder}: {describe_difference(self.manifest.identity, expected)}: images "
                "are encoded as their RIAE was trained; must be so here, or without latents"
            )
        if data.flip and not expected.mirrored:
            raise InputError(
                f"flip = True: {self.folder} holds no latents of mirrored images, because its RIAE "
                "was trained without flip; must be False, or without latents"
            )

    def split(self, name: str, shard: np.ndarray, flip: bool = False) -> LatentSplit:
        """Map the latents of a split; ``shard`` [N] is r2id.data.shards.Split.shard.

        Raises InputError when a file is missing or damaged, or does not fit the shard set.
        """
        flat, heights, widths, starts = [], [], [], []
        identity, files = self.manifest.identity, self.manifest.files[name]
        values_per_cell = identity.latent_channels * (2 if identity.mirrored else 1)
        for entry, count in zip(files, np.bincount(shard, minlength=len(files)), strict=True):
            values, height, width = _load(self.folder, entry)
            ends = np.cumsum(values_per_cell * height * width)
            if len(height) != count or (ends[-1] if count else 0) != len(values):
                raise InputError(
                    f"{self.folder / entry.file}: does not fit the shard set: run r2id encode again"
                )
            flat.append(values)
            heights.append(height)
            widths.append(width)
            starts.append(ends - values_per_cell * height * width)
        return LatentSplit(
            flat,
            np.concatenate(starts),
            np.concatenate(heights),
            np.concatenate(widths),
            shard,
            identity,
            flip,
        )


def read_latents(folder: Path) -> LatentManifest:
    """Read a cache's manifest; InputError when it is missing, damaged or edited."""
    path = folder / MANIFEST
    if not path.is_file():
        state = (
            "unfinished: run the same r2id encode again"
            if list(folder.glob("*/*.safetensors"))
            else ("not a latent cache (no latents.json): give a folder written by r2id encode")
        )
        absent = f"no such folder; r2id encode --riae … --shards … --out {folder} makes it"
        raise InputError(f"latents {folder}: {state if folder.is_dir() else absent}")
    try:
        manifest = LatentManifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InputError(
            f"{path}: damaged, edited or of another version: {str(error).splitlines()[0]}"
        ) from None
    if manifest.checksum != manifest.expected_checksum():
        raise InputError(f"{path}: edited or damaged: its checksum does not fit its content")
    return manifest


def verify_latents(folder: Path) -> list[Damage]:
    """Rehash a cache and list all damage; InputError when the folder is not a cache."""
    try:
        manifest = read_latents(folder)
    except InputError as error:
        if not (folder / MANIFEST).is_file():
            raise
        return [Damage(MANIFEST, str(error).removeprefix(f"{folder / MANIFEST}: "))]
    entries = [entry for files in manifest.files.values() for entry in files]
    present = {path.relative_to(folder).as_posix() for path in folder.glob("*/shard-*.safetensors")}
    damages = [
        Damage(extra, "not in the manifest")
        for extra in sorted(present - {entry.file for entry in entries})
    ]
    for entry in track(entries, "verify", unit="files"):
        path = folder / entry.file
        if not path.is_file():
            damages.append(Damage(entry.file, "missing"))
        elif path.stat().st_size != entry.bytes:
            damages.append(
                Damage(entry.file, f"{path.stat().st_size} bytes instead of {entry.bytes}")
            )
        elif sha256_file(path) != entry.sha256:
            damages.append(Damage(entry.file, "changed: its hash is not the manifest's"))
    return damages


def latent_loader(
    cache: LatentCache,
    shards: ShardSet,
    data: DataConfig,
    *,
    split: str,
    batch: int,
    micro_batch: int,
    seed: int,
    start_step: int,
    total_steps: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[list[MicroBatch]]:
    """Yield latents of the same samples in the same order as r2id.data.loader.image_loader.

    Micro-batches have ``"latent"``, float32 [b, L, h, w], not normalised, in place of "image". The
    cache must be of images that were prepared as ``data`` says, see LatentCache.check.
    """
    samples = shards.split(split)
    plan = RankPlan.of(samples, data, shards.digest, seed, batch, micro_batch, rank, world_size)
    steps = StepDataset(plan, samples, "latent", cache.split(split, samples.shard, data.flip))
    return load_items(steps, range(start_step, total_steps), data.workers)


def describe_difference(found: CacheIdentity, expected: CacheIdentity) -> str:
    """Describe the first difference of a cache's identity from the expected one."""
    words = {
        "codec_hash": "holds latents of another RIAE",
        "digest": "holds latents of another shard set",
    }
    for name in CacheIdentity.model_fields:
        was, value = getattr(found, name), getattr(expected, name)
        if was != value:
            what = words.get(name, "holds latents made otherwise")
            return f"{what} ({name} is {_short(was)}, not {_short(value)})"
    return "holds the same latents"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _load(folder: Path, entry: LatentFile) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Return (latents, flat and memory-mapped; heights; widths) of a file.

    Only the file's length is checked here. Hashing would read all of it; r2id verify does so.
    """
    path = folder / entry.file
    try:
        if path.stat().st_size != entry.bytes:
            raise InputError(
                f"{path}: {path.stat().st_size} bytes instead of {entry.bytes}: run r2id encode "
                "again"
            )
        with safe_open(path, "pt") as tensors:  # which maps them into memory
            latents, heights, widths = map(tensors.get_tensor, ("latents", "heights", "widths"))
        return latents, heights.numpy(), widths.numpy()
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: missing or damaged ({error}): run r2id encode again") from None
