"""Time and memory of ``r2id reconstruct`` on a picture of 12 megapixels, on one thread.

    python tests/bench/big_picture.py SHARDS --out FOLDER [--run RUN] [--size 3000x4000]
        [--format jpg]

The picture is a photo of SHARDS, mirrored until it fills the size. RUN is a trained RIAE; without
one, an RIAE with the default settings and cells of 8×8 pixels is trained for 20 steps, which takes
a minute and costs as much to use as a good one. It prints seconds and the most memory of the whole
command, as the system counted them. The goal is at most 60 s and 2 GiB. Its figures are under
"Speed and memory" in tests/bench/README.md.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from r2id.config import load_config
from r2id.config.arguments import parse_size
from r2id.data.records import decode
from r2id.data.shards import ShardSet
from r2id.training.loop import train

CONFIG = """
stage = "riae"
data = {channels = 3, window = [64, 64]}
riae = {downsample = 8, latent_channels = 16}
train = {steps = 20, batch = 8}
tracking = {enabled = false}
"""


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--size", type=parse_size, default=(3000, 4000))
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg")
    return parser.parse_args()


def trained(options):
    """An RIAE of 20 steps."""
    file = options.out / "riae.toml"
    file.write_text(CONFIG)
    config = load_config(file, [f"run={options.out / 'riae'}", f"data.shards={options.shards}"])
    train(config)
    return config.run


def picture(options):
    """Write the large picture."""
    split = ShardSet.open(options.shards).split("train")
    photo = decode(split.read(int((split.height * split.width).argmax())), 3)
    beyond = [(0, max(0, side - own)) for side, own in zip(options.size, photo.shape, strict=False)]
    large = np.pad(photo, [*beyond, (0, 0)], mode="symmetric")
    file = options.out / f"large.{options.format}"
    Image.fromarray(large[: options.size[0], : options.size[1]]).save(file, quality=95)
    return file


def measured(command):
    """Run a command on one thread → seconds, CPU seconds, bytes at most."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    began = time.perf_counter()
    child = os.posix_spawn(command[0], list(map(str, command)), environment)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(os.waitstatus_to_exitcode(status))
    seconds = time.perf_counter() - began
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main():
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    run, large = options.run or trained(options), picture(options)
    out = options.out / "reconstructed.png"
    command = [sys.executable, "-m", "r2id.cli", "reconstruct", run, large, "--out", out]
    seconds, processor, most = measured([*command, "--overwrite"])
    print(
        f"{options.size[0]}×{options.size[1]}: {seconds:.1f} s, {processor:.1f} s of the CPU, "
        f"at most {most / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
