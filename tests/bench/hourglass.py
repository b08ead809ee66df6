"""Time of a training step of a pixel R2ID with hourglass levels, from 64×64 to 512×512 pixels.

    python tests/bench/hourglass.py [section.key=value ...] [--sides 64 128 256 512] [--bfloat16]
        [--json]

One picture of three colours, untrained weights, forward and backward pass and AdamW's update; the
least of three steps. The goal is an exponent of at most 1.1 in the number of pixels. Overrides are
those of a config, such as 'r2id.levels=[]' for a flat model. Its figures are under "Speed and
memory" in tests/bench/README.md.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from r2id.config import R2idRun, load_config
from r2id.models.r2id import R2ID
from r2id.training.losses.r2id import R2idLoss

CONFIG = """
stage = "r2id"
run = "none"
data = {shards = "none", channels = 3}
train = {steps = 1}
diffusion = {objective = "flow", schedule = "flow", multiscale = 2}

[r2id]
width = 128
heads = 4
encoder_blocks = 2
decoder_blocks = 4
dropout = 0.0
levels = [{width = 32, blocks = 1}, {width = 64, blocks = 1}, {width = 96, blocks = 1}]
"""


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--sides", nargs="+", type=int, default=[64, 128, 256, 512])
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def made(overrides):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "r2id.toml"
        file.write_text(CONFIG)
        config = load_config(file, overrides)
    assert isinstance(config, R2idRun)
    torch.manual_seed(0)
    model = R2ID(config.r2id, config.data.channels, classes=10)
    return R2idLoss(model, config.diffusion, base_side=64.0, seed=0)


def seconds(loss, side, bfloat16):
    """CPU seconds of the quickest of three steps."""
    optimizer, found = torch.optim.AdamW(loss.parameters()), []
    picture = torch.randn(1, loss.model.out.out_features, side, side)
    for step in range(3):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value, _ = loss(picture, torch.tensor([step]), torch.tensor([step]), step)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(time.process_time() - began)
    return min(found)


def main():
    given = arguments()
    loss = made(given.overrides)
    seconds(loss, 32, given.bfloat16)
    rows = [{"side": side, "seconds": seconds(loss, side, given.bfloat16)} for side in given.sides]
    sides, times = (np.log([row[name] for row in rows]) for name in ("side", "seconds"))
    exponent = float(np.polyfit(2 * sides, times, 1)[0])
    if given.json:
        print(json.dumps({"rows": rows, "exponent": exponent}))
        return
    for row in rows:
        print(f"{row['side']:5}²  {row['seconds']:8.3f} s")
    print(f"time grows with pixels to the power {exponent:.3f}")


if __name__ == "__main__":
    main()
