"""Time of a training step of a pixel R2ID with hourglass levels, from 64×64 to 512×512 pixels.

    python tests/bench/hourglass.py [section.key=value ...] [--sides 64 128 256 512] [--bfloat16]
        [--json]

One picture of three colours, untrained weights, forward and backward pass and AdamW's update; the
least of three steps. The goal is an exponent of at most 1.1 in the number of pixels. Overrides are
those of a config, such as 'r2id.levels=[]' for a flat model. Its figures are under "Speed and
memory" in tests/bench/README.md.
"""

import time

import torch
from measure import config_of, scaling_arguments, show_scaling

from r2id.config import R2idRun
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


def made(overrides):
    config = config_of(CONFIG, overrides)
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
    given = scaling_arguments(__doc__, [64, 128, 256, 512])
    loss = made(given.overrides)
    seconds(loss, 32, given.bfloat16)
    rows = [{"side": side, "seconds": seconds(loss, side, given.bfloat16)} for side in given.sides]
    show_scaling(rows, given.json)


if __name__ == "__main__":
    main()
