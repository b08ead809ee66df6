"""Time and memory of RIAE's encode and decode from 64×64 to 1024×1024 with tiled attention.

    python tests/bench/riae_scaling.py [--sides 64 128 256 512 1024] [--bfloat16] [--json]
        [riae.key=value ...]

One image, untrained weights, the same size in and out; the least of three times. Memory is what the
process takes at most, beyond what it has before. The goal is an exponent of at most 1.1 in the
number of pixels, and at most 2 GiB at 1024×1024. Its figures are under "Speed and memory" in
tests/bench/README.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measure import baseline, reset_peak, resident

from r2id.config import RiaeRun, load_config
from r2id.models.riae import RIAE

CONFIG = """
stage = "riae"
run = "none"
data = {shards = "none", channels = 3}
train = {steps = 1}
riae = {attention = "tiled", width = 128, pixel_width = 64, heads = 4, latent_channels = 16}
"""


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 128, 256, 512, 1024])
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def made(overrides):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "riae.toml"
        file.write_text(CONFIG)
        config = load_config(file, overrides)
    assert isinstance(config, RiaeRun)
    torch.manual_seed(0)
    return RIAE(config.riae, config.data.channels).eval()


def measure(model, side, bfloat16):
    """Seconds, and bytes at most, of one image there and back."""
    reset_peak()
    before, seconds = resident("VmRSS"), []
    image = torch.rand(1, model.channels, side, side) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        for _ in range(3):
            began = time.perf_counter()
            model.decode(model.encode(image), (side, side))
            seconds.append(time.perf_counter() - began)
    return {"side": side, "seconds": min(seconds), "bytes": resident("VmHWM") - before}


def main():
    given = arguments()
    model = made(given.overrides)
    measure(model, 32, given.bfloat16)
    baseline()
    found = [measure(model, side, given.bfloat16) for side in given.sides]
    pixels, seconds = (np.log([row[name] for row in found]) for name in ("side", "seconds"))
    exponent = float(np.polyfit(2 * pixels, seconds, 1)[0])
    if given.json:
        print(json.dumps({"rows": found, "exponent": exponent}))
        return
    for row in found:
        print(f"{row['side']:5}²  {row['seconds']:8.3f} s  {row['bytes'] / 2**20:8.0f} MiB")
    print(f"time grows with pixels to the power {exponent:.3f}")


if __name__ == "__main__":
    main()
