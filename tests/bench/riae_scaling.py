"""Time and memory of RIAE's encode and decode from 64×64 to 1024×1024.

    python tests/bench/riae_scaling.py [--sides 64 128 256 512 1024] [--bfloat16] [--json]
        [riae.key=value ...]

One image, untrained weights, the same size in and out; the least of three times. Memory is what the
process takes at most, beyond what it has before. The goal is an exponent of at most 1.1 in the
number of pixels, and at most 2 GiB at 1024×1024. Its figures are under "Speed and memory" in
tests/bench/README.md.
"""

import time

import torch
from measure import baseline, config_of, reset_peak, resident, scaling_arguments, show_scaling

from r2id.config import RiaeRun
from r2id.models.riae import RIAE

CONFIG = """
stage = "riae"
run = "none"
data = {shards = "none", channels = 3}
train = {steps = 1}

[riae]
width = 128
encoder_blocks = 2
decoder_blocks = 3
latent_channels = 16
"""


def made(overrides):
    config = config_of(CONFIG, overrides)
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
    given = scaling_arguments(__doc__, [64, 128, 256, 512, 1024])
    model = made(given.overrides)
    measure(model, 32, given.bfloat16)
    baseline()
    show_scaling([measure(model, side, given.bfloat16) for side in given.sides], given.json)


if __name__ == "__main__":
    main()
