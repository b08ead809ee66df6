"""The latent cache: raw latents of every image of a shard set by one RIAE, and the loader that trains from it.

A cache is a folder::

    latents.json                       which RIAE, which data, how images were prepared, all files; written last
    <split>/shard-000000.safetensors   "latents": float32, the samples' [L, h, w] one after the other, flat;
                                       "heights", "widths": int64 [samples], their grids; its metadata says the same
                                       as latents.json, so that it is its own commit marker

There is one file per image shard, with its samples in the index's order. Normalisation is not applied here.
Shape letters: b micro-batch · L latent channels · h, w latent grid.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from r2id.config import DataConfig
from r2id.data.files import TEMPORARY, sweep, write_atomic
from r2id.data.loader import MicroBatch, Schedule, Steps, load_steps
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError

FORMAT_VERSION = 1
MANIFEST = "latents.json"


class Identity(BaseModel):
    """What a cache was made of and how: another one of these is another cache."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    codec_hash: str
    digest: str
    """Of the shard set."""
    latent_channels: int
    channels: int
    size: tuple[int, int] | None
    max_pixels: int


class LatentManifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    identity: Identity
    codec: str
    """Where the RIAE was; for people."""
    files: dict[str, list[str]]
    """Of each split, in shard order."""


class LatentWriter:
    """Writes a cache, file by file; one that was interrupted goes on.

    For every (split, number of a shard) for which ``done`` says no: ``write``; at the end ``finish``.
    """

    def __init__(self, folder: Path, shards: ShardSet, data: DataConfig, *, codec_hash: str, codec_path: Path,
                 latent_channels: int) -> None:
        """InputError when the folder holds something else, or latents of other data or of another RIAE."""
        self.folder, self.codec_path = folder, codec_path
        self.identity = Identity(codec_hash=codec_hash, digest=shards.digest, latent_channels=latent_channels,
                                 channels=data.channels, size=data.size, max_pixels=data.max_pixels)
        self.files = {name: [_latent_file(entry.file) for entry in split.shards]
                      for name, split in shards.manifest.splits.items()}
        self._splits = shards
        self._check_vacant()
        sweep(folder)

    def done(self, split: str, number: int) -> bool:
        """Whether that file is there."""
        return _identity_of(self.folder / self.files[split][number]) == self.identity

    def write(self, split: str, number: int, latents: Sequence[torch.Tensor]) -> None:
        """The latents [L, h, w] of all samples of one shard, in the index's order: complete or not at all."""
        expected = len(self._splits.split(split).in_shard(number))
        assert len(latents) == expected, f"{len(latents)} latents for {expected} samples"
        parts = [latent.detach().float().cpu() for latent in latents]
        tensors = {"latents": torch.cat([part.reshape(-1) for part in parts]) if parts else torch.zeros(0),
                   "heights": torch.tensor([part.shape[1] for part in parts], dtype=torch.int64),
                   "widths": torch.tensor([part.shape[2] for part in parts], dtype=torch.int64)}
        if not torch.isfinite(tensors["latents"]).all():
            raise WorkError(f"{self.files[split][number]}: latents that are not finite: the RIAE at {self.codec_path} "
                            "is not usable")
        write_atomic(self.folder / self.files[split][number],
                     save(tensors, metadata={"identity": self.identity.model_dump_json()}))

    def finish(self) -> None:
        """Commit the cache. Every file must be there."""
        for split, files in self.files.items():
            for number, file in enumerate(files):
                if not self.done(split, number):
                    raise WorkError(f"{self.folder / file}: not written")
        manifest = LatentManifest(identity=self.identity, codec=str(self.codec_path), files=self.files)
        write_atomic(self.folder / MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())

    def _check_vacant(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"out {self.folder}: exists and is no folder")
        own = {self.folder / MANIFEST, *(self.folder / file for files in self.files.values() for file in files)}
        present = sorted(path for path in self.folder.rglob("*") if path.is_file()) if self.folder.exists() else []
        for path in present:
            found = _identity_of(path)
            if found is None and (path in own or path.suffix == TEMPORARY):
                continue  # the manifest, or what was cut short and will be written again
            if found is None:
                raise InputError(f"out {self.folder}: exists and holds something else ({path.name}): choose another "
                                 "folder")
            if found != self.identity:
                raise InputError(f"out {self.folder}: {_difference(found, self.identity)}: choose another folder, or "
                                 "remove this one")


@dataclass(frozen=True)
class LatentSplit:
    """The latents of one split, mapped from disk."""

    flat: list[np.ndarray]
    """Of each shard, float32."""
    start: np.ndarray
    """Of each sample, in its shard's flat array; int64 [N]."""
    height: np.ndarray
    width: np.ndarray
    shard: np.ndarray
    latent_channels: int

    def __call__(self, indices: np.ndarray, _height: int, _width: int, _key: torch.Tensor) -> torch.Tensor:
        """float32 [b, L, h, w] of samples whose images are of one size, and whose grids therefore are too."""
        grid = int(self.height[indices[0]]), int(self.width[indices[0]])
        count = self.latent_channels * grid[0] * grid[1]
        parts = [self.flat[self.shard[i]][self.start[i]:self.start[i] + count] for i in indices]
        return torch.from_numpy(np.stack(parts)).reshape(len(indices), self.latent_channels, *grid)


@dataclass(frozen=True)
class LatentCache:
    """An open cache."""

    folder: Path
    manifest: LatentManifest

    @classmethod
    def open(cls, folder: Path, expect_codec_hash: str, expect_digest: str) -> LatentCache:
        """InputError when the folder is no complete cache, or one of another RIAE or of other data."""
        path = folder / MANIFEST
        if not path.is_file():
            state = "unfinished: run the same r2id encode again" if list(folder.glob("*/*.safetensors")) else (
                "not a latent cache (no latents.json): give a folder written by r2id encode")
            raise InputError(f"{folder}: {state if folder.is_dir() else 'no such folder'}")
        try:
            manifest = LatentManifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise InputError(f"{path}: damaged or edited: {str(error).splitlines()[0]}") from None
        expected = manifest.identity.model_copy(update={
            "format_version": FORMAT_VERSION, "codec_hash": expect_codec_hash, "digest": expect_digest})
        if manifest.identity != expected:
            raise InputError(f"{folder}: {_difference(manifest.identity, expected)}: run r2id encode again, into "
                             "another folder")
        return cls(folder, manifest)

    def check(self, data: DataConfig) -> None:
        """InputError when the images were prepared in another way than this config asks for."""
        expected = self.manifest.identity.model_copy(update={
            "channels": data.channels, "size": data.size, "max_pixels": data.max_pixels})
        if self.manifest.identity != expected:
            raise InputError(f"{self.folder}: {_difference(self.manifest.identity, expected)}: run r2id encode again, "
                             "into another folder")

    def split(self, name: str, shard: np.ndarray) -> LatentSplit:
        """``shard`` [N] is the image index's column of that name. InputError when a file is missing or damaged."""
        flat, heights, widths, starts = [], [], [], []
        latent_channels = self.manifest.identity.latent_channels
        counts = np.bincount(shard, minlength=len(self.manifest.files[name]))
        for file, count in zip(self.manifest.files[name], counts, strict=True):
            values, height, width = self._load(self.folder / file)
            ends = np.cumsum(latent_channels * height * width)
            if len(height) != count or (ends[-1] if count else 0) != len(values):
                raise InputError(f"{self.folder / file}: does not fit the shard set: run r2id encode again")
            flat.append(values)
            heights.append(height)
            widths.append(width)
            starts.append(ends - latent_channels * height * width)
        return LatentSplit(flat, np.concatenate(starts), np.concatenate(heights), np.concatenate(widths), shard,
                           latent_channels)

    def _load(self, path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if _identity_of(path) != self.manifest.identity:
            raise InputError(f"{path}: missing, damaged or of another cache: run r2id encode again")
        with safe_open(path, "np") as tensors:
            heights, widths = tensors.get_tensor("heights"), tensors.get_tensor("widths")
        return _map_tensor(path, "latents"), heights, widths


def latent_loader(cache: LatentCache, shards: ShardSet, data: DataConfig, *, split: str, batch: int, micro_batch: int,
                  seed: int, start_step: int, total_steps: int, rank: int = 0, world_size: int = 1,
                  ) -> Iterator[list[MicroBatch]]:
    """As image_loader, the same samples in the same order, with ``"latent": float32 [b, L, h, w]``, raw, for "image"."""
    cache.check(data)
    samples = shards.split(split)
    schedule = Schedule.of(samples, data, shards.digest, seed, batch, micro_batch, rank, world_size)
    steps = Steps(schedule, samples, "latent", cache.split(split, samples.shard))
    return load_steps(steps, range(start_step, total_steps), data.workers)


def _latent_file(shard_file: str) -> str:
    return str(Path(shard_file).with_suffix(".safetensors"))


def _identity_of(path: Path) -> Identity | None:
    """Of a cache file that is complete; safetensors refuses one that was cut short."""
    try:
        with safe_open(path, "np") as tensors:
            return Identity.model_validate_json((tensors.metadata() or {})["identity"])
    except (OSError, SafetensorError, KeyError, ValidationError):
        return None


def _map_tensor(path: Path, name: str) -> np.ndarray:
    """A flat float32 tensor of a safetensors file, left on disk: 8 bytes of header length, JSON header, data."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(length))[name]["data_offsets"]
    if start == end:
        return np.zeros(0, np.float32)
    return np.memmap(path, np.dtype("<f4"), "r", 8 + length + start, ((end - start) // 4,))


def _difference(found: Identity, expected: Identity) -> str:
    """The first way in which a cache is not the expected one, in words."""
    words = {"codec_hash": "holds latents of another RIAE", "digest": "holds latents of another shard set"}
    for name, value in expected.model_dump().items():
        was = getattr(found, name)
        if was != value:
            return f"{words.get(name, 'holds latents made otherwise')} ({name} is {_short(was)}, not {_short(value)})"
    return "holds the same latents"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
