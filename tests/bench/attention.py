"""Time of one attention call, forward and backward: plain products and PyTorch's fused kernel.

    python tests/bench/attention.py

Decides which of them r2id.models.attention.attend takes on a CPU.
"""

import math
import time

import torch
import torch.nn.functional as F

from r2id.models.attention import attend, plain_up_to


def milliseconds(call, tensors, repeats=10):
    def run():
        out = call(*tensors)
        out.backward(torch.ones_like(out))

    for _ in range(3):
        run()
    began = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - began) / repeats * 1e3


def main():
    print(f"{'batch heads queries keys width':32}{'dtype':10}{'plain':>10}{'fused':>10}")
    for shape in [
        (64, 4, 49, 392, 32),
        (64, 2, 256, 49, 32),
        (128, 3, 49, 49, 64),
        (8, 3, 1024, 1024, 64),
    ]:
        batch, heads, queries, keys, width = shape
        for dtype in (torch.float32, torch.bfloat16):
            tensors = [
                torch.randn(batch, heads, count, width, dtype=dtype, requires_grad=True)
                for count in (queries, keys, keys)
            ]
            with plain_up_to(math.inf):
                plain = milliseconds(attend, tensors)
            fused = milliseconds(F.scaled_dot_product_attention, tensors)
            print(f"{'×'.join(map(str, shape)):32}{str(dtype)[6:]:10}{plain:8.1f}ms{fused:8.1f}ms")


if __name__ == "__main__":
    main()
