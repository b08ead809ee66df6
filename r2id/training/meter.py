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
RATES = (
    "images_per_second",
    "tokens_per_second",
    "tflops_per_process",
    "mfu",
    "data_wait",
    "memory_gib",
)
"""Names of the figures that are no losses."""


class Meter:
    """Collects figures of a run: since the last reading, and from its start.

    ``cost`` counts what training on one image of a given size takes, and is called once per size;
    ``peak`` is the FLOP/s that one process can reach in matrix products. Tensors stay on the device
    until they are read, so that no step waits for them. Rates count the time spent on data and
    steps, not that of saving and drawing.
    """

    def __init__(self, device: torch.device, cost: Callable[[Size], Cost], peak: float) -> None:
        self.device, self.peak = device, peak
        self._cost, self._costs = cost, dict[Size, Cost]()
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor | int] = {}
        self._images = Counter[Size]()
        self._last, self._run = _Tally(), _Tally()
        self._mark = time.perf_counter()

    def lap(self, kind: str) -> None:
        """Count the time since the last lap as ``kind``: data, step or pause."""
        now = time.perf_counter()
        self._last.seconds[kind] += now - self._mark
        self._mark = now

    def add(
        self, figures: dict[str, Tensor], images: int, size: Size, kept: Tensor | None = None
    ) -> None:
        """Add a micro-batch of this process: its figures, and its images, which have one size.

        A figure is a scalar, or [2]: a sum over some of the images and their number, for the mean
        over those images alone. ``kept``, a boolean on the device, tells whether the figures count.
        """
        for key, value in figures.items():
            value = value.float() if kept is None else torch.where(kept, value.float(), 0.0)
            before = self._sums.get(key)
            self._sums[key] = value if before is None else before + value
            self._counts[key] = self._counts.get(key, 0) + (1 if kept is None else kept)
        self._images[size] += images

    def read(self) -> Figures:
        """Return the means over micro-batches and ranks, and the rates, since the last reading.

        The mean of a figure is over the micro-batches that had it: a loss may begin midway. It is
        left out where none of them counts. Every rank must call it, because sums are reduced over
        all of them.
        """
        totals = {
            key: dist.all_reduce_sum(total / self._counts[key]) / dist.world_size()
            for key, total in self._sums.items()
            if self._counts[key]
        }
        # The mean over no image is not a number, and is left out.
        parts = {key: total.tolist() for key, total in totals.items() if total.ndim}
        means = {key: float(total) for key, total in totals.items() if not total.ndim}
        means |= {key: total / count for key, (total, count) in parts.items() if count}
        # Only now, because reading the sums has made the host wait until the GPU's work is done.
        self.lap("step")
        self._count_work()
        self.lap("pause")  # the time of counting operations is not training time
        figures = {**means, **self._rates(self._last)}
        self._run.add(self._last)
        self._last, self._sums, self._counts, self._images = _Tally(), {}, {}, Counter()
        return figures

    def _count_work(self) -> None:
        """Count what was done since the last reading."""
        for size in self._images.keys() - self._costs.keys():
            self._costs[size] = self._cost(size)
        done = [(count, self._costs[size]) for size, count in self._images.items()]
        self._last.flops = sum(cost.flops * count for count, cost in done)
        own = sum(count for count, _ in done), sum(cost.tokens * count for count, cost in done)
        # Ranks that stream have different numbers of images, and of other sizes.
        everywhere = dist.all_reduce_sum(torch.tensor(own, device=self.device))
        self._last.images, self._last.tokens = everywhere.tolist()

    def summary(self) -> Figures:
        """Return the rates from the start of the run to the last reading."""
        return self._rates(self._run)

    def _rates(self, tally: _Tally) -> Figures:
        """Compute the rates of a tally.

        Images and tokens (latents) per second are those of the whole job. TFLOP/s are those of one
        process and count the model's own work only; ``mfu`` (model FLOP/s utilisation, Chowdhery et
        al. 2022, "PaLM", appendix B) is their share of the peak. ``data_wait`` is the share of time
        spent waiting for data, ``memory_gib`` the peak memory of this process.
        """
        busy = tally.seconds["data"] + tally.seconds["step"]
        rates = (
            tally.images / busy,
            tally.tokens / busy,
            tally.flops / busy / 1e12,
            tally.flops / busy / self.peak,
            tally.seconds["data"] / busy,
            peak_memory(self.device) / 2**30,
        )
        return dict(zip(RATES, rates, strict=True))


class _Tally:
    """Images and tokens of the whole job, FLOPs of this process, and seconds by their use."""

    def __init__(self) -> None:
        self.images = self.tokens = self.flops = 0
        self.seconds: dict[str, float] = {"data": 0.0, "step": 0.0, "pause": 0.0}

    def add(self, other: _Tally) -> None:
        self.images += other.images
        self.tokens += other.tokens
        self.flops += other.flops
        for kind, seconds in other.seconds.items():
            self.seconds[kind] += seconds


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far, in bytes: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024  # Linux counts in KiB


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOP/s that this process reaches in one large product of square matrices.

    The matrices have 8192 rows on a GPU and 1024 on a CPU. Takes about a tenth of a second, and
    returns the best of several products.
    """
    cuda = device.type == "cuda"
    side = 8192 if cuda else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    times: list[float] = []
    end = float("inf")
    while len(times) < 2 or time.perf_counter() < end:
        before = time.perf_counter()
        torch.mm(left, right, out=out)
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - before)
        if len(times) == 1:  # a GPU's first product loads a library, which may take a second
            end = time.perf_counter() + 0.1
    del left, right, out
    if cuda:
        # The run's own memory figures must not include these matrices.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * side**3 / min(times)
