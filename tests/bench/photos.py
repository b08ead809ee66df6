"""Tiled against cloud attention on photos, and what windows teach about whole photos.

    python tests/bench/photos.py SHARDS --out FOLDER [--seconds 180] [--rates 1e-3 2e-3 4e-3]
    python tests/bench/photos.py SHARDS --run RUN

The first trains both kinds, into a new folder, on windows of 64×64 of photos resized to 128²
pixels, at each peak learning rate, for as many steps as fit into the time at the speed of the first
ones. It prints PSNR on windows from the middle of held-out photos and on whole ones of 256² pixels.
The second takes a trained RIAE, and prints PSNR on held-out photos resized to 128×128, on windows
of 128×128 from their middle, and on whole photos. The figures are under "Reconstruction" in
tests/bench/README.md.
"""

import argparse
import time
from pathlib import Path

from r2id.config import DataConfig, load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.evaluation.images import resize
from r2id.evaluation.metrics import mse
from r2id.images import psnr
from r2id.models.codec import Codec
from r2id.training.loop import train

CONFIG = Path(__file__).with_name("attention-photos-riae.toml")
KINDS = {
    "tiled": ['riae.attention="tiled"'],
    "cloud": ['riae.attention="cloud"', "loss.encode_cloud=0.25"],
}
TRIED, WINDOW, LARGE = 12, 64, 128
SMALL_PHOTO, PHOTO = 128**2, 256**2  # pixels


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--run", type=Path)
    options = parser.parse_args()
    if bool(options.out) == bool(options.run):
        parser.error("one of --out and --run")
    return options


def prepared(options, name, steps, changes):
    return load_config(
        CONFIG,
        [
            f"data.shards={options.shards}",
            f"run={options.out / name}",
            f"data.window=[{WINDOW},{WINDOW}]",
            f"data.max_pixels={SMALL_PHOTO}",
            "loss.decode_pixels=512",
            "train.batch=16",
            f"train.steps={steps}",
            f"optim.warmup={min(50, steps)}",
            "tracking.enabled=false",
            f"train.preview_every={steps}",
            f"train.save_every={steps}",
            "train.log_every=10000",
            *changes,
        ],
    )


def timed(config):
    began = time.perf_counter()
    train(config)
    return time.perf_counter() - began


def photos(shards: Path, data: DataConfig, **changes):
    """Held-out ones, one by one."""
    for batch in eval_loader(
        ShardSet.open(shards), data.model_copy(update=changes), split=data.test_split, batch=1
    ):
        yield batch["image"]


def middle(image, side):
    """A window, less where the image is smaller."""
    y, x = (max(0, (length - side) // 2) for length in image.shape[2:])
    return image[:, :, y : y + side, x : x + side]


def quality(codec, image):
    return psnr(
        mse(codec.decode(codec.encode(image), (image.shape[2], image.shape[3])), image)
    ).item()


def compare_kinds(options):
    print("| attention | peak rate | steps | training | held-out windows | whole photos |")
    print(f"|{'---|' * 6}")
    for kind, changes in KINDS.items():
        # The first run of all prepares kernels; of the others each ends in the latents' statistics.
        _, few, more = (
            timed(prepared(options, f"{kind}-{name}", steps, changes))
            for name, steps in (("first", 2), ("few", 2), ("more", 2 + TRIED))
        )
        per_step = (more - few) / TRIED
        steps = max(1, int(options.seconds / per_step))
        for rate in options.rates:
            config = prepared(options, f"{kind}-{rate:g}", steps, [*changes, f"optim.lr={rate}"])
            seconds, codec = timed(config), Codec.load(config.run)
            windows, whole = (
                sum(found) / len(found)
                for found in (
                    [
                        quality(codec, middle(photo, WINDOW))
                        for photo in photos(options.shards, config.data)
                    ],
                    [
                        quality(codec, photo)
                        for photo in photos(options.shards, config.data, max_pixels=PHOTO)
                    ],
                )
            )
            print(
                f"| {kind} | {rate:g} | {steps} | {seconds:.0f} s | {windows:.2f} dB "
                f"| {whole:.2f} dB |",
                flush=True,
            )


def whole_photos(options):
    codec, config = Codec.load(options.run), load_config(options.run / "config.toml")
    found = {f"brought to {LARGE}×{LARGE}": [], f"windows of {LARGE}×{LARGE}": [], "whole": []}
    sizes = []
    for image in photos(options.shards, config.data):
        cases = resize(image, (LARGE, LARGE)), middle(image, LARGE), image
        for name, case in zip(found, cases, strict=True):
            found[name].append(quality(codec, case))
        sizes.append((image.shape[2], image.shape[3]))
    median = sorted(sizes)[len(sizes) // 2]
    print(f"{len(sizes)} held-out photos of {min(sizes)} to {max(sizes)}, median {median}")
    for name, values in found.items():
        print(f"| {name} | {sum(values) / len(values):.2f} dB |")


if __name__ == "__main__":
    options = arguments()
    whole_photos(options) if options.run else compare_kinds(options)
