"""Thousands of samples of one size, by all processes of a job, into PNG files or shards.

A folder is::

    sampling.json              what is to be drawn: checkpoint, settings, seeds; written first
    images/00000000.png        of each sample, by its number (format "png")
    samples/shard-000000.tar   of many, with an index, and in the end manifest.json: a shard set (format "shards")
    samples.json               what was drawn, and its digest; written last

Sample i has seed ``seed`` + i and the label that its number gives it. Samples are drawn in whole batches that begin at
multiples of the batch, whose size follows from the image's alone, so that a sample has the same bytes on one kind of device
however many processes draw, however many samples there are, and whenever it is drawn.

Shape letters: B batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import SamplerConfig, change
from r2id.data.index import find_intact, read_commit
from r2id.data.manifest import FORMAT_VERSION as SHARDS_VERSION
from r2id.data.manifest import Manifest, SplitEntry, shard_file
from r2id.data.records import Record
from r2id.data.shard_writer import write_shard_files
from r2id.errors import InputError, WorkError
from r2id.files import TEMPORARY, sha256_file, sweep, write_atomic, write_json
from r2id.images import encode_png
from r2id.models.coords import Size
from r2id.progress import Progress
from r2id.sampling.conditions import choose_labels
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

FORMAT_VERSION = 1
PLAN, RESULT = "sampling.json", "samples.json"
Format = Literal["png", "shards"]

_SPLIT = "samples"
_SHARD, _SHARD_PIXELS = (
    512,
    1 << 23,
)  # in a shard, at most, but always whole batches: what a killed process draws again


@dataclass(frozen=True)
class Plan:
    """What is to be drawn, and where."""

    out: Path
    facts: dict[str, Any]
    """Of sampling.json: all that the samples depend on."""
    labels: Tensor
    """int64, one per sample and as many more as the last batch needs to be whole."""
    settings: dict[str, Any]
    """Of Sampler.sample; among the facts too."""

    @property
    def count(self) -> int:
        return self.facts["count"]

    @property
    def size(self) -> Size:
        return self.facts["size"][0], self.facts["size"][1]

    @property
    def sharded(self) -> bool:
        return self.facts["format"] == "shards"

    @property
    def parts(self) -> list[range]:
        """Numbers of the samples that are drawn by one process, in turn."""
        batch = self.facts["batch"]
        length = shard_length(self.size, batch) if self.sharded else batch
        return [
            range(first, min(first + length, self.count)) for first in range(0, self.count, length)
        ]

    def shard(self, part: range) -> str:
        """The file of a part."""
        return shard_file(_SPLIT, part.start // shard_length(self.size, self.facts["batch"]))

    def picture(self, number: int) -> Path:
        return self.out / "images" / f"{number:08d}.png"

    def done(self, part: range) -> bool:
        if self.sharded:
            return find_intact(self.out, self.shard(part)) is not None
        return all(self.picture(number).is_file() for number in part)


def shard_length(size: Size, batch: int) -> int:
    """Samples of a size in a shard: whole batches, which are a power of two, too."""
    most = max(1, min(_SHARD, _SHARD_PIXELS // (size[0] * size[1])))
    return max(batch, 1 << most.bit_length() - 1)


def draw_many(
    source: Checkpoint | Path,
    out: Path,
    sizes: Sequence[Size],
    *,
    kind: Format,
    labels: Sequence[int] = (),
    count: int | None = None,
    seed: int | None = None,
    grid: Size | None = None,
    settings: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Sample a checkpoint ``count`` times at one size into the folder ``out``; what is there already is kept.

    ``settings`` are Sampler.sample's own (steps, guidance, solver); what is None is the run's. In a job of several processes
    (torchrun) each draws its share, on its own device. Returns the folder, the numbers of samples and of those found in
    place, and the digest of all. InputError when the folder holds something else, or samples of other settings.
    """
    world = dist.init()
    checkpoint = Checkpoint.open(source)
    sampler = Sampler.load(checkpoint, world.device if world.world_size > 1 else device)
    plan = make_plan(
        sampler,
        checkpoint.identity,
        out,
        sizes,
        kind=kind,
        labels=labels,
        count=count,
        seed=seed,
        grid=grid,
        settings=settings or {},
    )
    _check(plan)  # on every process, so that every one ends with the error
    parts = dist.broadcast_object(_begin(plan) if dist.is_main() else None)
    mine = parts[world.rank :: world.world_size]
    with Progress("sample", sum(map(len, mine)), unit="images", shown=dist.is_main()) as progress:
        for part in mine:
            _write(plan, sampler, part, progress)
    dist.barrier()
    digest = dist.broadcast_object(_finish(plan) if dist.is_main() else None)
    return {
        "out": str(out),
        "images": plan.count,
        "size": list(plan.size),
        "format": kind,
        "reused": plan.count - sum(map(len, parts)),
        "digest": digest,
    }


def make_plan(
    sampler: Sampler,
    identity: str,
    out: Path,
    sizes: Sequence[Size],
    *,
    kind: Format,
    labels: Sequence[int],
    count: int | None,
    seed: int | None,
    grid: Size | None,
    settings: Mapping[str, Any],
) -> Plan:
    """With every setting that the samples depend on. InputError for more sizes than one, or labels that are none."""
    if len(sizes) > 1:
        raise InputError(f"--format {kind}: takes one --size, and there are {len(sizes)}")
    size = sizes[0] if sizes else sampler.codec.image
    check_samples(sampler, size, grid, sampler.batch_length(size, grid))
    count, batch = count or sampler.defaults.count, sampler.batch_length(size, grid)
    asked = {name: value for name, value in settings.items() if value is not None}
    resolved = change(sampler.defaults, asked).model_dump(
        mode="json", include=set(SamplerConfig.model_fields)
    )
    chosen = list(labels or sampler.defaults.labels)
    choose_labels(
        chosen, count, sampler.num_classes
    )  # those of the samples asked for; batches are filled up below
    facts = {
        "format_version": FORMAT_VERSION,
        "format": kind,
        "checkpoint": identity,
        "riae": sampler.codec.identity,
        "size": list(size),
        "grid": list(grid or sampler.grid_for(size)),
        "count": count,
        "first_seed": sampler.defaults.seed if seed is None else seed,
        "labels": chosen,
        "classes": sampler.num_classes,
        "shift_exponent": sampler.diffusion.shift_exponent,
        **resolved,
        "batch": batch,
        "device": sampler.codec.device.type,
    }
    return Plan(
        out, facts, choose_labels(chosen, -(-count // batch) * batch, sampler.num_classes), resolved
    )


def _check(plan: Plan) -> None:
    """InputError when the folder holds something else than these samples, or some of them."""
    out = plan.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; must be a folder")
    stored = _read(out / PLAN)
    if stored is None:
        foreign = (
            sorted(path.name for path in out.iterdir() if path.suffix != TEMPORARY)
            if out.is_dir()
            else []
        )
        if foreign:
            raise InputError(
                f"--out {out}: exists and holds something else ({foreign[0]}); choose another folder"
            )
        return
    for name in {**stored, **plan.facts}:
        if stored.get(name) != plan.facts.get(name):
            raise InputError(
                f"--out {out}: holds samples of {name} = {stored.get(name)!r}, not {plan.facts.get(name)!r}; "
                "choose another folder, or remove this one"
            )


def _begin(plan: Plan) -> list[range]:
    """Write the plan; the parts that are still to be drawn."""
    if _read(plan.out / RESULT) is None:
        plan.out.mkdir(parents=True, exist_ok=True)
        sweep(plan.out)
        write_json(plan.out / PLAN, plan.facts)
    return [part for part in plan.parts if not plan.done(part)]


def _finish(plan: Plan) -> str:
    """Commit what was drawn; the digest of it."""
    digest = _seal(plan) if plan.sharded else _digest(plan)
    write_json(plan.out / RESULT, {**plan.facts, "digest": digest})
    return digest


def _digest(plan: Plan) -> str:
    """Of all pictures, in order."""
    try:
        hashes = [sha256_file(plan.picture(number)) for number in range(plan.count)]
    except OSError as error:
        raise WorkError(f"{error.filename}: not written: {error.strerror}") from None
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def _seal(plan: Plan) -> str:
    """Write the manifest of the shard set; its checksum."""
    try:
        entries = [read_commit(plan.out, plan.shard(part))[0] for part in plan.parts]
    except (OSError, ValueError) as error:
        raise WorkError(f"{plan.out}: not written: {error}") from None
    source = hashlib.sha256(json.dumps(plan.facts, sort_keys=True).encode()).hexdigest()
    return (
        Manifest(
            format_version=SHARDS_VERSION,
            dataset="samples",
            source_digest=source,
            rejects=0,
            class_names=[str(label) for label in range(plan.facts["classes"])],
            splits={
                _SPLIT: SplitEntry(
                    samples=plan.count, bytes=sum(entry.bytes for entry in entries), shards=entries
                )
            },
        )
        .write(plan.out)
        .checksum
    )


def _write(plan: Plan, sampler: Sampler, part: range, progress: Progress) -> None:
    if plan.sharded:
        write_shard_files(plan.out, plan.shard(part), _records(plan, sampler, part, progress), [])
        return
    for number, image in _draw(plan, sampler, part, progress):
        if not plan.picture(number).is_file():
            write_atomic(plan.picture(number), encode_png(image))


def _records(plan: Plan, sampler: Sampler, part: range, progress: Progress) -> Iterator[Record]:
    for number, image in _draw(plan, sampler, part, progress):
        label = int(plan.labels[number])
        yield Record(
            key=f"{number:08d}",
            image=encode_png(image),
            ext="png",
            height=image.shape[1],
            width=image.shape[2],
            mode="L" if image.shape[0] == 1 else "RGB",
            label=None if label < 0 else label,
            meta={"seed": plan.facts["first_seed"] + number},
        )


def _draw(
    plan: Plan, sampler: Sampler, part: range, progress: Progress
) -> Iterator[tuple[int, Tensor]]:
    """(number, image [C, H, W]) of each sample of a part."""
    facts, batch = plan.facts, plan.facts["batch"]
    for first in range(part.start, part.stop, batch):
        whole = torch.arange(first, first + batch)
        images = sampler.sample(
            plan.labels[whole],
            facts["first_seed"] + whole,
            plan.size,
            grid=(facts["grid"][0], facts["grid"][1]),
            **plan.settings,
        )
        wanted = range(first, min(first + batch, part.stop))
        yield from zip(wanted, images[: len(wanted)], strict=True)
        progress.advance(len(wanted))


def _read(path: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: damaged; remove {path.parent} and sample again")
    return stored
