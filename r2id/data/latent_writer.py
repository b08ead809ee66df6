"""Write a latent cache from any number of processes; an interrupted run can be continued.

The format is described in r2id.data.latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save

from r2id.config import DataConfig
from r2id.data.latents import (
    MANIFEST,
    CacheIdentity,
    Dtype,
    LatentFile,
    LatentManifest,
    describe_difference,
)
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.files import TEMPORARY, sha256_file, sweep, write_atomic


class LatentWriter:
    """Writes a cache, one file per image shard.

    One process calls ``prepare`` first. Then any process calls ``write`` for every (split, shard
    number) that is not ``done``. When all are done, one process calls ``finish``.
    """

    def __init__(
        self,
        folder: Path,
        shards: ShardSet,
        data: DataConfig,
        *,
        codec_hash: str,
        codec_path: str,
        latent_channels: int,
        dtype: Dtype = "float32",
    ) -> None:
        self.folder, self.codec_path = folder, codec_path
        self.identity = CacheIdentity(
            codec_hash=codec_hash,
            digest=shards.digest,
            latent_channels=latent_channels,
            channels=data.channels,
            size=data.size,
            max_pixels=data.max_pixels,
            dtype=dtype,
            mirrored=data.flip,
        )
        self.files = {
            name: [str(Path(entry.file).with_suffix(".safetensors")) for entry in split.shards]
            for name, split in shards.manifest.splits.items()
            if split.samples  # all images of the others were rejected: they cannot be opened
        }
        self._shards = shards

    def prepare(self) -> None:
        """Check the folder and remove temporary files of killed writers.

        Raises InputError when it holds other files, or latents of other data or another RIAE.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"out {self.folder}: exists and is no folder")
        names = {file for files in self.files.values() for file in files}
        own = {MANIFEST, *names, *(_marker(file) for file in names)}
        present = (
            sorted(path for path in self.folder.rglob("*") if path.is_file())
            if self.folder.exists()
            else []
        )
        for path in present:
            if path.relative_to(self.folder).as_posix() not in own and path.suffix != TEMPORARY:
                raise InputError(
                    f"out {self.folder}: exists and holds something else ({path.name}): choose "
                    "another folder"
                )
            marker = _read_marker(path) if path.suffix == ".json" else None
            if marker is not None and marker.identity != self.identity:
                raise InputError(
                    f"out {self.folder}: {describe_difference(marker.identity, self.identity)}: "
                    "choose another folder, or remove this one"
                )
        sweep(self.folder)

    def done(self, split: str, number: int) -> bool:
        """Return whether a shard's file is there and has the right hash."""
        return self._entry(split, number, rehash=True) is not None

    def write(self, split: str, number: int, latents: Sequence[torch.Tensor]) -> None:
        """Write the latents of all samples of one shard, in the order of its index.

        Each is [L, h, w], or [2, L, h, w] with those of the mirrored image in a mirrored cache.
        The file appears complete or not at all. Raises WorkError for latents that are not finite in
        the cache's number format.
        """
        expected = len(self._shards.split(split).indices_in_shard(number))
        assert len(latents) == expected, f"{len(latents)} latents for {expected} samples"
        file, dtype = self.files[split][number], getattr(torch, self.identity.dtype)
        parts = [latent.detach().to(dtype).cpu() for latent in latents]
        tensors = {
            "latents": torch.cat([part.reshape(-1) for part in parts])
            if parts
            else torch.zeros(0, dtype=dtype),
            "heights": torch.tensor([part.shape[-2] for part in parts], dtype=torch.int64),
            "widths": torch.tensor([part.shape[-1] for part in parts], dtype=torch.int64),
        }
        if not torch.isfinite(tensors["latents"]).all():
            raise WorkError(
                f"{file}: latents that are not finite in {self.identity.dtype}: the RIAE at "
                f"{self.codec_path} is not usable, or needs a wider number format"
            )
        data = save(tensors)
        write_atomic(self.folder / file, data)
        entry = LatentFile(
            identity=self.identity,
            file=file,
            samples=expected,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
        )
        write_atomic(self.folder / _marker(file), (entry.model_dump_json(indent=1) + "\n").encode())

    def finish(self) -> None:
        """Commit the cache by writing its manifest; WorkError when a file is missing."""
        files: dict[str, list[LatentFile]] = {}
        for split, names in self.files.items():
            for number, file in enumerate(names):
                entry = self._entry(split, number, rehash=False)
                if entry is None:
                    raise WorkError(f"{self.folder / file}: not written")
                files.setdefault(split, []).append(entry)
        manifest = LatentManifest(identity=self.identity, codec=self.codec_path, files=files)
        sealed = manifest.model_copy(update={"checksum": manifest.expected_checksum()})
        write_atomic(self.folder / MANIFEST, (sealed.model_dump_json(indent=1) + "\n").encode())

    def _entry(self, split: str, number: int, rehash: bool) -> LatentFile | None:
        """Return a file's commit marker if the file fits it, else None."""
        file = self.files[split][number]
        samples = self._shards.manifest.splits[split].shards[number].samples
        path = self.folder / file
        entry = _read_marker(path.with_suffix(".json"))
        if entry is None or not path.is_file():
            return None
        if (entry.identity, entry.file, entry.samples) != (self.identity, file, samples):
            return None
        if path.stat().st_size != entry.bytes or (rehash and sha256_file(path) != entry.sha256):
            return None
        return entry


def _marker(file: str) -> str:
    """Return the path of a file's commit marker, which is written after the file itself."""
    return str(Path(file).with_suffix(".json"))


def _read_marker(path: Path) -> LatentFile | None:
    try:
        return LatentFile.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
