"""R2ID beside other generators of classes of photos, each trained for equal CPU seconds.

    python tests/bench/peers.py --seconds 600 [--out FOLDER] [--data data] [--only NAME …]
        [--seed N] [--samples 1000] [--resized 500]

Compared are diffusers' UNet2DModel in pixels, trained and sampled as in its authors' course, by
DDIM in 50 steps (``unet``); diffusers' DiT on the latents of the plain convolutional autoencoder of
autoencoders.py (``dit``; both need ``pip install r2id[bench]``); R2ID on RIAE with
configs/photos/small-riae.toml and small-r2id.toml (``r2id``); and R2ID in pixels with
peers-pixels-r2id.toml (``r2id-pixels``); these three by DPM-Solver++ in 20 steps. The convolutional
autoencoder has the pixel loss and the latent noise of RIAE's config. A fifth of the seconds are the
autoencoder's, where there is one, and encoding the images counts too. All see the same batches, of
photos and mirrored photos, keep averaged weights, and have learning rates that fall as the seconds
end. R2ID on RIAE has the rates of its configs; the others get the best of three, by the loss after
a fifth of the seconds, which are not counted. Seconds are those of the process, on one thread,
while it trains.

Each draws its samples with the guidance of 1, 1.5, 2 and 3 that has the least Fréchet distance on a
quarter of them. Samples of other sizes are drawn on a grid as much larger; by R2ID on RIAE also on
the trained grid, decoded at the size; and beside them stand those of 32×32, resized bicubically.
The floor is what real training images have, resized in the same way.

Everything is kept in OUT: weights, samples, figures. What is finished is not made again, what was
interrupted goes on, and processes with other names after --only may fill one OUT together. The
tables have all that is finished. OUT/peers.png shows the first samples, not chosen. The tables are
Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import torch
from autoencoder_training import TUNING
from contenders import CONTENDERS, NAMES
from image_sets import Images
from kept_samples import draw_kept, score
from peer_training import LARGER, Contender, Setup
from torch import Tensor

from r2id.config import Run, load_config
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.images import resize
from r2id.evaluation.r2id import measure_real_baseline
from r2id.evaluation.reference import Figures, ImageFeatures
from r2id.files import write_atomic
from r2id.images import tile, to_bytes, to_float, to_uint8
from r2id.models.coords import Size
from r2id.progress import say
from r2id.sampling.conditions import choose_labels

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "configs" / "photos"
SIZES: tuple[Size, ...] = ((48, 48), (64, 64), (48, 32), (32, 48))
"""Other sizes than the trained one."""
GUIDANCES = (1.0, 1.5, 2.0, 3.0)
BICUBIC = "bicubic"
SHOWN = 10  # samples of a row in the picture


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/peers"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="holds the shards photos")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=1000, help="at the trained size")
    parser.add_argument("--resized", type=int, default=500, help="samples at each other size")
    return parser.parse_args()


def configured(file: Path, options: argparse.Namespace) -> Run:
    data = [f"data.shards={options.data / 'photos'}", f"seed={options.seed}"]
    return load_config(file, [*data, "tracking.enabled=false"])


def named(size: Size) -> str:
    return f"{size[0]}×{size[1]}"


class Bench:
    """The images, the judge and the rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.options = options.out, options
        riae, r2id = (
            configured(CONFIGS / f"small-{name}.toml", options) for name in ("riae", "r2id")
        )
        pixels = configured(HERE / "peers-pixels-r2id.toml", options)
        self.shards, self.data = ShardSet.open(riae.data.shards), riae.data
        images = Images(self.shards, riae.data)
        if images.flip:
            images.mirror()
        self.setup = Setup(
            images,
            self.shards.num_classes,
            options.seconds,
            options.seed,
            options.out,
            riae,
            r2id,
            pixels,
        )
        self.judge = load_or_train_classifier(
            self.shards, riae.data, self.out / "classifier.safetensors", torch.device("cpu")
        )
        parts = {"riae": riae, "r2id": r2id, "pixels": pixels}
        facts = {"seconds": options.seconds, "seed": options.seed, "images": self.shards.digest}
        for name, config in parts.items():
            facts[name] = config.model_dump(mode="json", exclude={"run", "data", "codec"})
        self.facts = facts
        self.rows: dict[str, dict[str, Any]] = {}
        for name in CONTENDERS:
            if self.file(name).is_file() or name in options.only:
                self.rows[name] = self.row(name)
        self.floors: dict[Size, tuple[ImageFeatures, dict[str, Any]]] = {}

    def file(self, name: str) -> Path:
        """Where the figures of one of them are kept; several can be made at once."""
        return self.out / f"{name}.json"

    def row(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = {"facts": self.facts, "judge": self.judge.hash}
        if self.file(name).is_file():
            row = json.loads(self.file(name).read_text())
            if row["facts"] != self.facts:
                raise InputError(
                    f"{self.file(name)}: made with other seconds, images or settings: give another "
                    "--out"
                )
        if row["judge"] != self.judge.hash:
            say(f"{name}: another judge: its samples are scored again")
            row["judge"] = self.judge.hash
            row.pop("scores", None)
        return row

    @property
    def finished(self) -> dict[str, dict[str, Any]]:
        """The rows that have all their scores."""
        last = f"{named(SIZES[-1])} {BICUBIC}"
        return {name: row for name, row in self.rows.items() if last in row.get("scores", {})}

    def keep(self, name: str) -> None:
        text = json.dumps(self.rows[name], indent=1, ensure_ascii=False)
        write_atomic(self.file(name), text.encode())

    def make(self, name: str) -> None:
        """Train and score one of them, as far as that has not been done."""
        row, contender = self.rows[name], CONTENDERS[name](name, self.setup)
        if "training" not in row:
            say(f"{name}: training")
            row["code"] = contender.prepare()
            self.keep(name)
            rate = self.rate(contender, row.setdefault("tried", {}))
            before = row["code"]["cpu_seconds"]
            row["training"] = contender.train(rate, self.setup.seconds, before)
            row["rate"] = rate
            self.keep(name)
        if "guidance" not in row:
            row["guidances"] = {f"{scale:g}": self.frechet(contender, scale) for scale in GUIDANCES}
            row["guidance"] = min(GUIDANCES, key=lambda scale: row["guidances"][f"{scale:g}"])
            self.keep(name)
        scores = row.setdefault("scores", {})
        for size in (self.setup.size, *SIZES):
            for way in self.ways(contender, size):
                key = f"{named(size)} {way}"
                if scores.get(key, {}).get("samples") != self.count(size):
                    scores[key] = self.score(contender, size, way, row["guidance"])
                    self.keep(name)

    def rate(self, contender: Contender, tried: dict[str, float]) -> float:
        """The learning rate of least loss after a short trial."""
        if len(contender.rates) == 1:
            return contender.rates[0]
        for rate in contender.rates:
            if f"{rate:g}" not in tried:
                seconds = TUNING * self.setup.seconds
                tried[f"{rate:g}"] = contender.try_rate(rate, seconds)
                self.keep(contender.name)
        return min(contender.rates, key=lambda rate: tried[f"{rate:g}"])

    def ways(self, contender: Contender, size: Size) -> tuple[str, ...]:
        return (LARGER,) if size == self.setup.size else (*contender.ways, BICUBIC)

    def samples(
        self, contender: Contender, size: Size, way: str, guidance: float, count: int
    ) -> tuple[Tensor, float]:
        """Draw uint8 images [count, C, *size] of all classes in turn, or go on drawing them.

        → the images, and CPU seconds of each.
        """
        if way == BICUBIC:
            images, seconds = self.samples(contender, self.setup.size, LARGER, guidance, count)
            return to_uint8(resize(to_float(images), size)), seconds
        place = f"{contender.name}-{size[0]}x{size[1]}-{way.partition(' ')[0]}-{guidance:g}"
        labels = choose_labels((), count, self.setup.classes)
        seeds = torch.arange(count) + (self.setup.seed << 20)
        return draw_kept(
            self.out / f"samples-{place}.safetensors",
            count,
            lambda rows: contender.draw(labels[rows], seeds[rows], size, guidance, way),
        )

    def frechet(self, contender: Contender, guidance: float) -> float:
        count = max(4, self.options.samples // 4)
        images, _ = self.samples(contender, self.setup.size, LARGER, guidance, count)
        found = self.compared(images, self.setup.size)["frechet"]
        assert found is not None
        return found

    def compared(self, images: Tensor, size: Size) -> Figures:
        labels = choose_labels((), len(images), self.setup.classes)
        return score(self.judge, images, labels, self.floor(size)[0])

    def floor(self, size: Size) -> tuple[ImageFeatures, dict[str, Any]]:
        """Features of real test images at a size, and what real training images have."""
        if size not in self.floors:
            self.floors[size] = measure_real_baseline(
                self.judge, self.shards, self.data, size, self.count(size)
            )
        return self.floors[size]

    def count(self, size: Size) -> int:
        return self.options.samples if size == self.setup.size else self.options.resized

    def score(self, contender: Contender, size: Size, way: str, guidance: float) -> dict[str, Any]:
        images, seconds = self.samples(contender, size, way, guidance, self.count(size))
        return {**self.compared(images, size), "seconds_per_image": seconds}

    def picture(self) -> None:
        """Draw the first samples of everybody: a row for each way, a column for each size."""
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        shown = min(SHOWN, self.options.samples, self.options.resized)
        sizes = (self.setup.size, *SIZES)
        rows = [
            (name, way)
            for name in self.finished
            for way in self.ways(CONTENDERS[name](name, self.setup), SIZES[0])
        ]
        widths = [shown * width for _, width in sizes]
        figure, axes = plt.subplots(
            len(rows),
            len(sizes),
            figsize=(sum(widths) / 80, len(rows) * max(height for height, _ in sizes) / 80 + 0.5),
            squeeze=False,
            width_ratios=widths,
        )
        for line, (name, way) in zip(axes, rows, strict=True):
            contender, guidance = CONTENDERS[name](name, self.setup), self.rows[name]["guidance"]
            for at, size in zip(line, sizes, strict=True):
                at.set_xticks([])
                at.set_yticks([])
                title = [NAMES[name], named(size), *([way] if size in SIZES else [])]
                at.set_title(", ".join(title), fontsize=5, pad=1)
                if way in self.ways(contender, size):
                    images, _ = self.samples(contender, size, way, guidance, shown)
                    strip = tile(to_float(images), shown)
                    at.imshow(to_bytes(strip).numpy(), interpolation="nearest")
                else:
                    at.set_visible(False)
        figure.tight_layout(pad=0.2)
        figure.savefig(self.out / "peers.png", dpi=160)
        plt.close(figure)

    def tables(self) -> Iterator[str]:
        size = self.setup.size
        yield (
            f"{named(size)}, {self.setup.seconds:g} CPU seconds each, {self.options.samples} "
            f"samples ({self.options.resized} of other sizes); the judge has "
            f"{self.judge.test_accuracy:.3f} on real test images"
        )
        heads = ["generator", "parameters", "steps × batch", "images/s", "rate", "guidance"]
        heads += ["accuracy", "Fréchet", "precision", "recall", "s per sample"]
        yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for name, row in self.finished.items():
            training, score = row["training"], row["scores"][f"{named(size)} {LARGER}"]
            cells = [NAMES[name], parameters(row)]
            cells += [f"{training['steps']:,} × {training['batch']}"]
            cells += [f"{training['images_per_second']:.0f}", f"{row['rate']:g}"]
            cells += [f"{row['guidance']:g}", f"{score['accuracy']:.3f}", f"{score['frechet']:.3g}"]
            cells += [f"{score[figure]:.2f}" for figure in ("precision", "recall")]
            cells.append(f"{score['seconds_per_image']:.2f}")
            yield f"| {' | '.join(cells)} |"
        floor = self.floor(size)[1]
        cells = ["real training images", "", "", "", "", "", f"{self.judge.test_accuracy:.3f}"]
        cells += [f"{floor['frechet_of_training_images']:.3g}"]
        cells += [f"{floor[f'{f}_of_training_images']:.2f}" for f in ("precision", "recall")]
        yield f"| {' | '.join([*cells, ''])} |"
        yield from self._other_sizes()

    def _other_sizes(self) -> Iterator[str]:
        yield "\nFréchet distance, accuracy, recall:\n"
        yield f"| generator | way | {' | '.join(map(named, SIZES))} |\n|{'---|' * (2 + len(SIZES))}"
        for name, row in self.finished.items():
            for way in self.ways(CONTENDERS[name](name, self.setup), SIZES[0]):
                scores = [row["scores"][f"{named(size)} {way}"] for size in SIZES]
                cells = [
                    f"{score['frechet']:.3g}, {score['accuracy']:.3f}, {score['recall']:.2f}"
                    for score in scores
                ]
                yield f"| {NAMES[name]} | {way} | {' | '.join(cells)} |"
        cells = []
        for size in SIZES:
            floor = self.floor(size)[1]
            frechet, recall = (floor[f"{f}_of_training_images"] for f in ("frechet", "recall"))
            cells.append(f"{frechet:.3g}, –, {recall:.2f}")
        yield f"| real training images | bicubic | {' | '.join(cells)} |"


def parameters(row: dict[str, Any]) -> str:
    """The generator's and its autoencoder's."""
    parts = [row["training"]["parameters"], row["code"].get("parameters")]
    return " + ".join(f"{part / 1e6:.1f} M" for part in parts if part)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for name in options.only:
        bench.make(name)
    bench.picture()
    print("\n".join(bench.tables()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
