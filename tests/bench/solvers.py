"""What each solver draws with how many evaluations of the network: one trained R2ID, same seeds.

    python tests/bench/solvers.py RUN --out FOLDER [--shards SHARDS] [--judge FILE] [--count 500]
        [--guidance G] [--size HxW]

Draws samples with DDIM, DPM-Solver++ (2M), Euler and Heun, in 5, 10, 20 and 50 evaluations, of
which Heun's method takes two per step but for the last (3, 5, 10 and 25 steps). For flow Euler's
method is DDIM, and left out. Scored by the classifier of real images (FILE is one that an
evaluation has kept). Samples and figures are kept in OUT and not made again; what was interrupted
goes on. OUT/solvers.png shows the same seeds: a row for each solver and number of evaluations. The
table is Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from kept_samples import draw_kept, sampling_arguments, score
from torch import Tensor

from r2id.checkpoints import Checkpoint
from r2id.config import R2idRun, load_config
from r2id.data.shards import ShardSet
from r2id.diffusion.solvers import SOLVERS
from r2id.errors import InputError
from r2id.evaluation.classifier import load_or_train_classifier
from r2id.evaluation.r2id import measure_real_baseline
from r2id.files import write_atomic
from r2id.images import save_png, tile, to_float
from r2id.sampling.conditions import choose_labels
from r2id.sampling.sampler import Sampler

EVALUATIONS = (5, 10, 20, 50)
SHOWN = 10
NAMES = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M", "euler": "Euler", "heun": "Heun"}


def arguments() -> argparse.Namespace:
    parser = sampling_arguments(__doc__, 500)
    parser.add_argument("--guidance", type=float, help="default: the run's")
    parser.add_argument("--size", metavar="HxW", help="default: that of the training images")
    return parser.parse_args()


def steps_of(solver: str, evaluations: int) -> int:
    """The steps that take that many evaluations, or one less."""
    return (evaluations + 1) // 2 if solver == "heun" else evaluations


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.out, self.count = options.out, options.count
        self.sampler = Sampler.load(options.run)
        if not self.sampler.num_classes:
            raise InputError(f"{options.run}: is not conditioned on classes, which are judged here")
        height, width = map(int, (options.size or "0x0").split("x"))
        self.size = (height, width) if options.size else self.sampler.codec.image
        given, default = options.guidance, self.sampler.defaults.guidance
        self.guidance = default if given is None else given
        run = load_config(options.run / "config.toml")
        assert isinstance(run, R2idRun)
        data = run.data.model_copy(update={"latents": None})
        shards = ShardSet.open(options.shards or data.shards)
        judge = options.judge or self.out / "classifier.safetensors"
        self.judge = load_or_train_classifier(shards, data, judge, torch.device("cpu"))
        self.real, self.floor = measure_real_baseline(
            self.judge, shards, data, self.size, self.count
        )
        flow = self.sampler.diffusion.schedule == "flow"
        self.solvers = [name for name in SOLVERS if not (flow and name == "euler")]
        self.labels = choose_labels((), self.count, self.sampler.num_classes)
        self.file = self.out / "solvers.json"
        facts = {
            "model": Checkpoint.open(options.run).identity,
            "size": list(self.size),
            "guidance": self.guidance,
            "images": shards.digest,
        }
        self.found: dict[str, Any] = {"facts": facts, "rows": {}}
        if not self.file.is_file():  # now: samples are kept before there is a row
            self.write()
        self.found = json.loads(self.file.read_text())
        if self.found["facts"] != facts:
            raise InputError(
                f"{self.file}: of another model, size, guidance or images: give another --out"
            )

    def write(self) -> None:
        text = json.dumps(self.found, indent=1, ensure_ascii=False)
        write_atomic(self.file, text.encode())

    def samples(self, solver: str, evaluations: int, count: int) -> tuple[Tensor, float]:
        def draw(rows: slice) -> Tensor:
            seeds, steps = torch.arange(self.count)[rows], steps_of(solver, evaluations)
            return self.sampler.sample(
                self.labels[rows],
                seeds,
                self.size,
                steps=steps,
                solver=solver,
                guidance=self.guidance,
            )

        return draw_kept(self.out / f"samples-{solver}-{evaluations}.safetensors", count, draw)

    def make(self, solver: str, evaluations: int) -> None:
        key, rows = f"{solver} {evaluations}", self.found["rows"]
        wanted = {"samples": self.count, "judge": self.judge.hash}
        if key in rows and wanted.items() <= rows[key].items():
            return
        images, seconds = self.samples(solver, evaluations, self.count)
        figures = score(self.judge, images, self.labels, self.real)
        rows[key] = {**figures, **wanted, "seconds_per_image": seconds}
        self.write()

    def picture(self) -> None:
        rows = [
            to_float(self.samples(solver, evaluations, min(SHOWN, self.count))[0])
            for solver in self.solvers
            for evaluations in EVALUATIONS
        ]
        save_png(tile(torch.cat(rows), len(rows[0])), self.out / "solvers.png")

    def tables(self) -> Iterator[str]:
        yield (
            f"{self.size[0]}×{self.size[1]}, guidance {self.guidance:g}, {self.count} samples: "
            f"Fréchet, accuracy, recall; real training images: "
            f"{self.floor['frechet_of_training_images']:.3g}, {self.judge.test_accuracy:.3f}, "
            f"{self.floor['recall_of_training_images']:.2f}"
        )
        heads = [f"{count} evaluations" for count in EVALUATIONS]
        yield f"\n| solver | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}"
        for solver in self.solvers:
            rows = [self.found["rows"][f"{solver} {count}"] for count in EVALUATIONS]
            cells = [
                f"{row['frechet']:.3g}, {row['accuracy']:.3f}, {row['recall']:.2f}" for row in rows
            ]
            yield f"| {NAMES[solver]} | {' | '.join(cells)} |"


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for solver in bench.solvers:
        for evaluations in EVALUATIONS:
            bench.make(solver, evaluations)
    bench.picture()
    print("\n".join(bench.tables()), flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
