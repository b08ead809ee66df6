"""RIAE against other codes of equal latents, each trained for equal CPU seconds on one thread.

    python tests/bench/autoencoders.py --set photos --seconds 180 [--out FOLDER] [--data data]
        [--only NAME …] [--config RIAE.toml] [--override section.key=value …]

Compared are PCA of the pixels of each cell (``pca``), and of pixels that are mixed across the
borders of cells (``lapped``), which is where RIAE starts; RIAE (``riae``) without noise on its
latents; and two convolutional autoencoders of about RIAE's number of parameters: diffusers'
AutoencoderKL (``kl``, needs ``pip install r2id[bench]``) and a plain one that is faster on a CPU
(``plain``). All see the same batches; the last two get the best of three learning rates, each tried
for a fifth of the seconds. Seconds are those of the process while it trains, RIAE's PCA included;
loading and evaluation do not count.

Sets (--set): digits, mnist and photos as the configs of these names prepare them, and native:
photos at their own sizes, of which every tenth is held out, trained in windows of 64×64 with cells
of 8×8 pixels (native-8) and of 4×4 (native-4).

Measured on test images: PSNR (mean over images), SSIM, and the Fréchet distance of reconstructions
to the images in the features of a classifier of real images (not for native, which has no classes).
Images are coded at the trained size and decoded at others. The truth there is the image, resized
from finer originals where there are any (native), else bicubically; "½ to 1" decodes images of half
the size at the size of the originals, which are the truth. In brackets is what bicubic
resizing of the code's own reconstruction has, and then, of convolutional ones, the decoder run on
resized latents. *Coded at* is the image of that size, coded on a latent grid of its own.

Finished rows are kept in OUT/SET.json, weights beside it, and are not made again. OUT/SET.png shows
all beside one another. The tables are Markdown; their figures are under "Autoencoders" in
tests/bench/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from autoencoder_training import PEERS, Job, load, train
from codes import Code
from image_sets import SETTINGS, Images, Setting, Windows
from safetensors.torch import load_file, save_file
from torch import Tensor

from r2id.config import RiaeRun, load_config
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.evaluation.classifier import Classifier, load_or_train_classifier
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import frechet_distance, mse, ssim
from r2id.images import psnr, to_uint8
from r2id.models.coords import Size, scale_size
from r2id.progress import Progress, say
from r2id.training.precision import resolve_precision

CONFIGS = Path(__file__).parents[2] / "configs"
SCALES = {
    "½": (0.5, 0.5),
    "¾": (0.75, 0.75),
    "1½": (1.5, 1.5),
    "2": (2.0, 2.0),
    "3:2": (1.5, 1.0),
    "2:3": (1.0, 1.5),
}
"""Factors of height and width."""
UP = "½ to 1"
"""Name of a further measurement: images of half the size, decoded at the size."""
BATCH = 50
SIDES = (64, 128, 256, 512, 1024, 2048)
SLOWEST = 3.0  # seconds for one picture: twice its side is not measured
SHOWN = 6


GROUPS = {"native": ("native-8", "native-4")}
NAMES = {
    "pca": "PCA",
    "lapped": "PCA, lapped",
    "riae": "RIAE",
    "kl": "AutoencoderKL",
    "plain": "plain convolutions",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=[*SETTINGS, *GROUPS], required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/autoencoders"))
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the shard sets")
    parser.add_argument("--config", type=Path, help="RIAE's; default: the set's in configs/")
    parser.add_argument("--override", action="append", default=[], metavar="section.key=value")
    return parser.parse_args()


def configured(setting: Setting, options: argparse.Namespace) -> RiaeRun:
    """RIAE's config for a set."""
    path = options.config or CONFIGS / setting.config
    shape = [f"riae.downsample={setting.cell}", f"riae.latent_channels={setting.latents}"]
    data = [f"data.shards={options.data / setting.shards}", f"data.channels={setting.colours}"]
    if setting.size:
        data.append(f"data.size={list(setting.size)}")
    plain = ["loss.latent_noise=0.0", "loss.equivariance=0.0"]
    if setting.batch:
        plain.append(f"train.batch={setting.batch}")
    riae = load_config(path, [*shape, *data, *plain, *options.override])
    assert isinstance(riae, RiaeRun)
    riae = resolve_precision(riae, torch.device("cpu"))
    if riae.riae.kind != "lattice":
        raise InputError(f"{path}: riae.kind = {riae.riae.kind!r}: must be 'lattice' here")
    return riae


class Bench:
    """One set: its images, judge and rows."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.out, setting = name, options.out, SETTINGS[name]
        riae = configured(setting, options)
        shards = ShardSet.open(riae.data.shards)
        self.images = (Images if setting.size else Windows)(shards, riae.data)
        self.job = Job(riae, self.images.size, options.seconds, self.images.batch, self.images.some)
        self.judge: Classifier | None = None
        if setting.size:
            file = self.out / f"classifier-{name}.safetensors"
            self.judge = load_or_train_classifier(shards, riae.data, file, torch.device("cpu"))
        self.file = self.out / f"{name}.json"
        facts = {
            "seconds": options.seconds,
            "config": riae.model_dump(mode="json", exclude={"run", "data"}),
            "images": shards.digest,
        }
        self.found = {"facts": facts, "rows": {}}
        if self.file.is_file():
            self.found = json.loads(self.file.read_text())
            if self.found["facts"] != facts:
                raise InputError(
                    f"{self.file}: made with other seconds, images or settings: give another --out"
                )

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        return self.found["rows"]

    def make(self, name: str) -> None:
        """Train and measure one code, unless that has been done."""
        if name in self.rows:
            return
        say(f"{self.name}: {name}")
        code, weights, figures = train(self.job, name, lambda code: self.native(code)["psnr"])
        save_file(weights, self.weights(name))
        code = load(self.job, name, weights)
        row = {"parameters": code.parameters, **figures, "native": self.native(code)}
        row["sizes"] = {scale: self.resized(code, scale) for scale in (*SCALES, UP)}
        if self.images.whole:
            row["whole"] = self.whole(code)
        row["times"], row["exponent"] = self.times(code)
        self.rows[name] = row
        self.file.write_text(json.dumps(self.found, indent=1, ensure_ascii=False))

    def weights(self, name: str) -> Path:
        return self.out / f"{self.name}-{name}.safetensors"

    def native(self, code: Code) -> dict[str, float]:
        """Reconstruct test images at their own size."""
        tests, own = self.images.tests, self.images.size
        decoded = torch.cat([code.decode(code.encode(part), own) for part in tests.split(BATCH)])
        return self.compare(decoded, tests)

    def compare(self, decoded: Tensor, truth: Tensor) -> dict[str, float]:
        errors = mse(decoded, truth)
        found = {
            "mse": float(errors.mean()),
            "psnr": float(psnr(errors).mean()),
            "ssim": float(ssim(decoded, truth).mean()),
        }
        if self.judge is not None:
            one, other = self.judge.features(decoded), self.judge.features(truth)
            found["frechet"] = frechet_distance(one, other)
            agreed = self.judge.classify(decoded) == self.judge.classify(truth)
            found["same_class"] = float(agreed.double().mean())
        return found

    def resized(self, code: Code, scale: str) -> dict[str, Any]:
        """Decode at another size, in every way that the code has."""
        own = size = self.images.size
        if scale == UP:
            truth, _ = self.images.at(size)
            own = scale_size(size, SCALES["½"])
            tests = resize(truth, own)
        else:
            size = scale_size(own, SCALES[scale])
            tests, truth = self.images.at(size)
        ways: dict[str, list[Tensor]] = {"decoded": [], "bicubic": [], "network": [], "coded": []}
        for part, true in zip(tests.split(BATCH), truth.split(BATCH), strict=True):
            latents = code.encode(part)
            ways["decoded"].append(code.decode_at(latents, size, own))
            ways["bicubic"].append(resize(code.decode(latents, own), size))
            if (run := code.run_at(latents, size, own)) is not None:
                ways["network"].append(run)
            if scale != UP:
                ways["coded"].append(code.decode(code.encode(true), size))
        return {"size": size} | {
            way: self.compare(torch.cat(parts), truth) for way, parts in ways.items() if parts
        }

    def whole(self, code: Code) -> tuple[float, float]:
        """Mean PSNR of held-out photos, coded whole, and coded in windows of the trained size."""
        errors = []
        for photo in self.images.whole:
            decoded = code.decode(code.encode(photo), (photo.shape[2], photo.shape[3]))
            in_windows = torch.empty_like(photo)
            for rows, columns in windows(photo, self.images.size):
                part = photo[:, :, rows, columns]
                in_windows[:, :, rows, columns] = code.decode(
                    code.encode(part), (part.shape[2], part.shape[3])
                )
            errors.append(torch.stack([mse(decoded, photo), mse(in_windows, photo)], 1))
        whole, parts = psnr(torch.cat(errors)).mean(0).tolist()
        return whole, parts

    def times(self, code: Code) -> tuple[dict[str, float], float | None]:
        """CPU seconds there and back by side, and the exponent in the number of pixels."""
        found: dict[str, float] = {}
        for side in (32, *SIDES):  # the first prepares kernels
            image = torch.rand(1, self.job.channels, side, side) * 2 - 1
            tries = []
            for _ in range(3):
                began = time.process_time()
                code.decode(code.encode(image), (side, side))
                tries.append(time.process_time() - began)
                if sum(tries) > 2:
                    break
            found[str(side)] = min(tries)
            if min(tries) > SLOWEST:
                break
        del found["32"]
        if len(found) < 2:
            return found, None
        pixels = [2 * math.log(int(side)) for side in found]
        return found, float(np.polyfit(pixels, np.log(list(found.values())), 1)[0])

    def picture(self) -> None:
        """Draw test images, and what each code makes of them, at their size and at twice that."""
        own, twice = self.images.size, scale_size(self.images.size, SCALES["2"])
        tests, finer = self.images.at(twice)
        every = max(1, len(tests) // SHOWN)
        tests, finer = tests[::every][:SHOWN], finer[::every][:SHOWN]
        columns = {"original": (tests, finer)}
        for name in self.rows:
            code = load(self.job, name, load_file(self.weights(name)))
            latents = code.encode(tests)
            columns[NAMES[name]] = (code.decode(latents, own), code.decode_at(latents, twice, own))
            if name == "riae":
                bicubic = resize(code.decode(latents, own), twice)
                columns["RIAE, bicubic"] = (code.decode(latents, own), bicubic)
        draw(columns, self.out / f"{self.name}.png")

    def tables(self) -> Iterator[str]:
        setting = SETTINGS[self.name]
        size, cell = self.images.size, setting.cell
        yield (
            f"`{self.name}`: {size[0]}×{size[1]} to {size[0] // cell}×{size[1] // cell}"
            f"×{setting.latents}, {self.job.seconds:g} CPU seconds, {len(self.images.tests)} test "
            f"images"
        )
        heads = ["code", "parameters", "steps", "images/s", "PSNR", "SSIM"]
        heads += ["Fréchet, same class"] if self.judge else []
        heads += ["photos whole, in windows"] if self.images.whole else []
        heads += ["1024² there and back", "exponent"]
        yield f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for name, row in self.rows.items():
            native, exponent = row["native"], row["exponent"]
            cells = [NAMES[name], f"{row['parameters'] / 1e3:.0f} k", f"{row['steps']}"]
            cells.append(f"{row['images_per_second']:.0f}" if row["steps"] else "–")
            step_0 = f" (step 0: {row['step_0']:.2f})" if "step_0" in row else ""
            cells += [f"{native['psnr']:.2f} dB{step_0}", f"{native['ssim']:.4f}"]
            cells += [f"{native['frechet']:.3g}, {native['same_class']:.3f}"] if self.judge else []
            cells += ["{:.2f}, {:.2f} dB".format(*row["whole"])] if self.images.whole else []
            seconds = row["times"].get("1024")
            cells.append("–" if seconds is None else f"{seconds:.2f} s")
            yield f"| {' | '.join([*cells, '–' if exponent is None else f'{exponent:.2f}'])} |"
        yield from self._sizes("decoded at", ("decoded", "bicubic", "network"))
        yield from self._sizes("coded at", ("coded",))

    def _sizes(self, title: str, ways: Sequence[str]) -> Iterator[str]:
        scales = [*SCALES, UP] if "decoded" in ways else list(SCALES)
        yield f"\n| {title} | {' | '.join(scales)} |\n|{'---|' * (1 + len(scales))}"
        for name, row in self.rows.items():
            cells = [NAMES[name]]
            for scale in scales:
                found = row["sizes"][scale]
                first, *others = (f"{found[way]['psnr']:.2f}" for way in ways if way in found)
                cells.append(first + (f" ({', '.join(others)})" if others else ""))
            yield f"| {' | '.join(cells)} |"


def windows(photo: Tensor, size: Size) -> Iterator[tuple[slice, slice]]:
    """Cut a photo [1, C, H, W] into windows, smaller ones at the end."""
    for y in range(0, photo.shape[2], size[0]):
        for x in range(0, photo.shape[3], size[1]):
            yield slice(y, y + size[0]), slice(x, x + size[1])


def draw(columns: dict[str, tuple[Tensor, Tensor]], file: Path) -> None:
    """Write a picture: one column per code, rows of images at their size and at twice that."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2 * SHOWN, len(columns), figsize=(2 * len(columns), 4 * SHOWN), squeeze=False
    )
    for column, (title, both) in enumerate(columns.items()):
        for half, images in enumerate(both):
            for row, image in enumerate(to_uint8(images)):
                at = axes[half * SHOWN + row, column]
                pixels = image.movedim(0, -1).squeeze(-1).numpy()
                at.imshow(pixels, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                at.set_xticks([])
                at.set_yticks([])
            axes[half * SHOWN, column].set_title(title + (", at 2×" if half else ""), fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in GROUPS.get(options.set, (options.set,)):
        bench = Bench(name, options)
        with Progress(f"codes of {name}", len(options.only), unit="codes") as progress:
            for code in options.only:
                bench.make(code)
                progress.advance(note=code)
        bench.picture()
        print("\n".join(bench.tables()), flush=True)
        if bench.judge is None:
            print("\nNo Fréchet distances: the set has no classes to train a judge on.")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
