"""Measuring a training run: means of its losses, rates, where the time goes, and memory."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from r2id import dist
from r2id.models.coords import Size
from r2id.training.workload import Cost

Figures = dict[str, float]


class Meter:
    """Figures since the last reading, and of the whole run.

    ``cost`` counts what training on an image of a size takes (asked once a size); ``peak`` is the
    FLOP/s that one process can reach in matrix products. Tensors stay on the device until they are
    read, so that no step waits for them. Saving and drawing do not count as time.
    """

    def __init__(self, device: torch.device, cost: Callable[[Size], Cost], peak: float) -> None:
        self.device, self.peak = device, peak
        self._cost, self._costs = cost, dict[Size, Cost]()
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0
        self._last, self._run = _Tally(), _Tally()
        self._mark = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Count the time since the last lap as ``kind``: data, step or pause."""
        now = time.perf_counter()
        self._last.seconds[kind] += now - self._mark
        self._mark = now

    def add(self, figures: dict[str, Tensor], images: int, size: Size) -> None:
        """Count a micro-batch of this process: its figures, and its images, all of one size."""
        for key, value in figures.items():
            before = self._sums.get(key, torch.zeros((), device=self.device))
            self._sums[key] = before + value.float()
        self._micro_batches += 1
        self._last.images[size] += images

    def read(self) -> Figures:
        """Return means over micro-batches and ranks, and rates, since the last reading.

        Every rank must call it, for sums are reduced over all.
        """
        means = {
            key: float(dist.all_reduce_sum(total / self._micro_batches)) / dist.world_size()
            for key, total in self._sums.items()
        }
        # After the sums were read, which makes the host wait until a GPU has finished its work.
        self.lap("step")
        for size in self._last.images.keys() - self._costs.keys():
            self._costs[size] = self._cost(size)
        self.lap("pause")  # counting operations is no time of training
        figures = {**means, **self._rates(self._last)}
        self._run.add(self._last)
        self._last, self._sums, self._micro_batches = _Tally(), {}, 0
        return figures

    def summary(self) -> Figures:
        """Return the rates of the whole run, as far as it was read."""
        return self._rates(self._run)

    def _rates(self, tally: _Tally) -> Figures:
        """Compute the rates of a tally.

        Images and tokens (latents) per second are of the whole job. TFLOP/s are of one process, for
        the model's own work alone, and ``mfu`` is their share of the peak (model FLOP/s
        utilisation, Chowdhery et al. 2022, appendix B). ``data_wait`` is the share of time spent
        waiting for data; memory is the peak.
        """
        busy = tally.seconds["data"] + tally.seconds["step"]
        images, counts = sum(tally.images.values()), tally.images.items()
        tokens = sum(self._costs[size].tokens * count for size, count in counts)
        flops = sum(self._costs[size].flops * count for size, count in counts)
        return {
            "images_per_second": images * dist.world_size() / busy,
            "tokens_per_second": tokens * dist.world_size() / busy,
            "tflops_per_process": flops / busy / 1e12,
            "mfu": flops / busy / self.peak,
            "data_wait": tally.seconds["data"] / busy,
            "memory_gib": peak_memory(self.device) / 2**30,
        }


class _Tally:
    """Images counted by their size, and seconds by what they were spent on."""

    def __init__(self) -> None:
        self.images: Counter[Size] = Counter()
        self.seconds: dict[str, float] = {"data": 0.0, "step": 0.0, "pause": 0.0}

    def add(self, other: _Tally) -> None:
        self.images += other.images
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds


def peak_memory(device: torch.device) -> int:
    """Return the largest memory in bytes so far: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # Linux counts in KiB


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s of this process in one large product of square matrices.

    The best of several, in about a tenth of a second; 8192 rows on a GPU, 1024 on a CPU.
    """
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.1 or best == float("inf"):
        began = time.perf_counter()
        torch.mm(left, right, out=out)
        if cuda:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    del left, right, out
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / best
