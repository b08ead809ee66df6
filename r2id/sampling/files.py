"""Sample files: thousands of samples of one size, as PNG files or shards, drawn by many processes.

A folder is::

    sampling.json              the request: checkpoint, settings, seeds; written first
    images/00000000.png        format "png": one file per sample, by its number
    samples/shard-000000.tar   format "shards": a shard set with its manifest.json, see shards.py
    samples.json               the request again, with the digest of all samples; written last

Sample i has the seed ``seed`` + i, and its label depends on i alone. Samples are drawn in whole
batches that begin at multiples of the batch length, which depends on the size of image and grid
alone. So, on one kind of device, a sample has the same bytes however many processes draw, however
many samples there are, and whether or not drawing was interrupted.

Shape letters: C colours · H, W image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from r2id import dist
from r2id.checkpoints.trained import Trained, open_trained
from r2id.config import SamplerConfig, find_labels
from r2id.errors import InputError, WorkError
from r2id.files import TEMPORARY, sha256_file, sweep, write_atomic, write_json
from r2id.images import encode_png
from r2id.models.coords import Size
from r2id.progress import Progress
from r2id.sampling.conditions import choose_condition, choose_labels, resolve
from r2id.sampling.grids import say_smaller_grid
from r2id.sampling.memory import check_samples
from r2id.sampling.sampler import Sampler

FORMAT_VERSION = 1
REQUEST, RESULT = "sampling.json", "samples.json"
Format = Literal["png", "shards"]
Samples = Iterator[tuple[int, Tensor]]
"""(number, image [C, H, W] in [−1, 1]) of each sample."""


class Writer(Protocol):
    """How samples are stored: PngFiles, or ShardFiles of r2id.sampling.shards.

    Samples are drawn in parts: a part is a range of sample numbers that one process draws and
    writes as a whole.
    """

    length: int
    """Samples per part, a multiple of the batch length."""

    def is_done(self, part: range) -> bool:
        """Tell whether all samples of a part have been written."""

    def write(self, part: range, samples: Samples) -> None:
        """Write the samples of a part. It is not done when this is interrupted."""

    def finish(self, parts: Sequence[range]) -> str:
        """Commit all parts; return the digest of all samples."""


@dataclass(frozen=True)
class Request:
    """Which samples a folder is to hold."""

    facts: dict[str, Any]
    """The content of sampling.json: everything that the samples depend on."""
    labels: Tensor
    """Labels of all samples, int64 [count, rounded up to whole batches]."""
    condition: Tensor
    """What all of them are drawn under: those labels, or attributes or embeddings."""
    settings: dict[str, Any]
    """Keyword arguments of Sampler.sample. ``facts`` has them too."""
    class_names: Sequence[str]
    """Names of the classes."""

    @property
    def count(self) -> int:
        """Number of samples."""
        return self.facts["count"]

    @property
    def size(self) -> Size:
        """Height and width of the samples."""
        return self.facts["size"][0], self.facts["size"][1]

    def parts(self, length: int) -> list[range]:
        """Split the sample numbers into parts of this length; the last may be shorter."""
        starts = range(0, self.count, length)
        return [range(first, min(first + length, self.count)) for first in starts]


def draw_many(
    source: Trained | Path,
    out: Path,
    sizes: Sequence[Size],
    *,
    kind: Format,
    labels: Sequence[int | str] = (),
    count: int | None = None,
    seed: int | None = None,
    attributes: Sequence[str] = (),
    embedding: Path | None = None,
    grid: Size | None = None,
    settings: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Draw ``count`` samples of one size from a checkpoint into the folder ``out``.

    Samples that are in the folder already are kept. ``settings`` are those of Sampler.sample
    (steps, guidance, solver…). The run's own setting replaces one that is None, and so for
    ``labels``, ``count`` and ``seed``. ``attributes`` and ``embedding``: see choose_condition. In a
    job of several processes (torchrun) each draws its share, on its own device.

    Returns the folder, the number of samples, how many of them were kept, and the digest of all.
    Raises InputError when the folder holds something else, or samples of other settings.
    """
    world = dist.init()
    trained = open_trained(source, "r2id")
    sampler = Sampler.load(trained, world.device if world.world_size > 1 else device)
    sizes = tuple(sizes) or sampler.defaults.sizes or (sampler.codec.image,)
    if len(sizes) > 1:
        names = ", ".join(f"{height}x{width}" for height, width in sizes)
        raise InputError(f"--format {kind}: takes one --size, and there are {len(sizes)}: {names}")
    request = make_request(
        sampler,
        trained.identity,
        sizes[0],
        kind=kind,
        labels=labels,
        count=count,
        seed=seed,
        attributes=attributes,
        embedding=embedding,
        grid=grid,
        settings=settings or {},
    )
    _check_folder(out, request)  # on every process, so that all of them end with the error
    if dist.is_main():
        say_smaller_grid(sampler, request.size, grid)
    writer = _make_writer(out, request)
    with dist.exclusive(out):
        # The main process alone looks and decides, so that all agree on what is missing.
        missing = dist.broadcast_object(_begin(out, request, writer) if dist.is_main() else None)
        mine, total = missing[world.rank :: world.world_size], sum(map(len, missing))
        count = sum(map(len, mine))
        with Progress("sample", count, unit="images", shown=dist.is_main()) as progress:
            for part in mine:
                writer.write(part, _draw(request, sampler, part, progress))
        dist.barrier()
        digest = dist.broadcast_object(_finish(out, request, writer) if dist.is_main() else None)
    return {
        "out": str(out),
        "images": request.count,
        "size": list(request.size),
        "format": kind,
        "reused": request.count - total,
        "digest": digest,
    }


def make_request(
    sampler: Sampler,
    identity: str,
    size: Size,
    *,
    kind: Format,
    labels: Sequence[int | str],
    count: int | None,
    seed: int | None,
    grid: Size | None,
    settings: Mapping[str, Any],
    attributes: Sequence[str] = (),
    embedding: Path | None = None,
) -> Request:
    """Resolve every setting that the samples depend on. ``identity`` is that of the checkpoint.

    Raises InputError for labels or guidance that the model does not have, and when a batch would
    not fit into memory.
    """
    batch = sampler.batch_length(size, grid)
    check_samples(sampler, size, grid, batch)
    wanted = resolve(sampler, labels=tuple(labels), count=count, seed=seed, **settings)
    sampler.check_guidance(wanted.guidance, wanted.autoguidance)
    count, classes = wanted.count, sampler.num_classes
    chosen = find_labels(wanted.labels, classes, sampler.class_names)
    names = set(SamplerConfig.model_fields)
    resolved = wanted.model_dump(mode="json", include=names)
    own_labels = choose_labels(chosen, count, classes)  # InputError for more than samples
    condition = choose_condition(sampler, own_labels, attributes, embedding)
    *first, last = map(list, sampler.diffused_grids(size, grid))
    facts = {
        "format_version": FORMAT_VERSION,
        "format": kind,
        "checkpoint": identity,
        "riae": sampler.codec.identity,
        "size": list(size),
        **({"first_grids": first} if first else {}),
        "grid": last,
        "count": count,
        "first_seed": wanted.seed,
        "labels": chosen,
        **({"attributes": list(attributes)} if attributes else {}),
        **({"embedding_sha256": sha256_file(embedding)} if embedding else {}),
        "classes": classes,
        "shift_exponent": sampler.diffusion.shift_exponent,
        **resolved,
        "batch": batch,
        "device": sampler.codec.device.type,
    }
    whole_batches = -(-count // batch) * batch  # count, rounded up
    labels_of_all = choose_labels(chosen, whole_batches, classes)
    if condition is own_labels:
        condition = labels_of_all
    else:  # those beyond the last sample are not kept
        condition = condition[torch.arange(whole_batches) % count]
    return Request(facts, labels_of_all, condition, resolved, sampler.class_names)


class PngFiles:
    """One PNG file per sample."""

    def __init__(self, out: Path, batch: int) -> None:
        self.out, self.length = out, batch

    def is_done(self, part: range) -> bool:
        """See Writer."""
        return all(self._file(number).is_file() for number in part)

    def write(self, part: range, samples: Samples) -> None:
        """See Writer."""
        for number, image in samples:
            if not self._file(number).is_file():
                write_atomic(self._file(number), encode_png(image))

    def finish(self, parts: Sequence[range]) -> str:
        """Compute the digest of all files, in order. Raises WorkError when one is missing."""
        try:
            hashes = [sha256_file(self._file(number)) for part in parts for number in part]
        except OSError as error:
            raise WorkError(f"{error.filename}: not written: {error.strerror}") from None
        return hashlib.sha256("".join(hashes).encode()).hexdigest()

    def _file(self, number: int) -> Path:
        return self.out / "images" / f"{number:08d}.png"


def _make_writer(out: Path, request: Request) -> Writer:
    """Make the writer for the request's format."""
    if request.facts["format"] == "png":
        return PngFiles(out, request.facts["batch"])
    # Imported here, because it loads pyarrow, which nothing else in inference needs.
    from r2id.sampling.shards import ShardFiles

    return ShardFiles(out, request.facts, request.labels.tolist(), request.class_names)


def _check_folder(out: Path, request: Request) -> None:
    """Raise InputError when the folder holds anything but samples of this request."""
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; must be a folder")
    stored = _read(out / REQUEST)
    if stored is None:
        paths = out.iterdir() if out.is_dir() else ()
        foreign = sorted(path.name for path in paths if path.suffix != TEMPORARY)
        if foreign:
            raise InputError(
                f"--out {out}: exists and holds something else ({foreign[0]}); "
                "choose another folder"
            )
        return
    for name in {**stored, **request.facts}:
        existing, requested = stored.get(name), request.facts.get(name)
        if existing != requested:
            raise InputError(
                f"--out {out}: holds samples of {name} = {existing!r}, not {requested!r}; "
                "choose another folder, or remove this one"
            )


def _begin(out: Path, request: Request, writer: Writer) -> list[range]:
    """Write sampling.json, and return the parts that are still to be drawn."""
    if _read(out / RESULT) is None:
        out.mkdir(parents=True, exist_ok=True)
        sweep(out)
        write_json(out / REQUEST, request.facts)
    return [part for part in request.parts(writer.length) if not writer.is_done(part)]


def _finish(out: Path, request: Request, writer: Writer) -> str:
    """Commit all samples and write samples.json; return the digest."""
    digest = writer.finish(request.parts(writer.length))
    write_json(out / RESULT, {**request.facts, "digest": digest})
    return digest


def _draw(request: Request, sampler: Sampler, part: range, progress: Progress) -> Samples:
    """Draw the samples of a part, a batch at a time."""
    facts, batch = request.facts, request.facts["batch"]
    for first in range(part.start, part.stop, batch):
        # The last batch is drawn whole too, and its surplus dropped: in a shorter one, matrix
        # products would round differently.
        numbers = torch.arange(first, first + batch)
        images = sampler.sample(
            request.condition[numbers],
            facts["first_seed"] + numbers,
            request.size,
            grid=(facts["grid"][0], facts["grid"][1]),
            **request.settings,
        )
        wanted = range(first, min(first + batch, part.stop))
        yield from zip(wanted, images[: len(wanted)], strict=True)
        progress.advance(len(wanted))


def _read(path: Path) -> dict[str, Any] | None:
    """Read sampling.json or samples.json; None if missing. Raises InputError when it is damaged."""
    try:
        stored = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: damaged; remove {path.parent} and sample again")
    return stored
