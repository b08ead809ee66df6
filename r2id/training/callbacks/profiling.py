"""Tracing some training steps with torch's profiler."""

from __future__ import annotations

from pathlib import Path

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from r2id import dist
from r2id.progress import say
from r2id.training.callbacks.base import Callback
from r2id.training.state import TrainState

_SKIPPED, _WARM, _TRACED = 3, 2, 10
"""Numbers of steps that the profiler skips, warms up in, and traces, one after the other."""


class Profiling(Callback):
    """Trace ten steps, after five others, when the run was started with ``profile``.

    Every process writes RUN/profile/rank-R.json.gz, for chrome://tracing or
    https://ui.perfetto.dev, and RUN/profile/rank-R.txt, a table of the slowest operations.
    """

    def __init__(self) -> None:
        self.profile: profile | None = None
        self.written = False

    def pre_train(self, state: TrainState) -> None:
        if state.profile:
            self.folder = state.folder / "profile"
            self.profile = profile(
                activities=supported_activities(),
                on_trace_ready=self._write,
                schedule=schedule(
                    skip_first=_SKIPPED, wait=0, warmup=_WARM, active=_TRACED, repeat=1
                ),
            )
            self.profile.start()

    def post_step(self, state: TrainState) -> None:
        if self.profile is not None:
            self.profile.step()

    def close(self, state: TrainState, error: BaseException | None) -> None:
        if self.profile is None:
            return
        self.profile.stop()
        if not self.written and error is None:
            # The profiler hands over its trace at the end, but only if it has begun to trace.
            least, best = _SKIPPED + _WARM + 1, _SKIPPED + _WARM + _TRACED
            say(f"nothing was traced: tracing takes at least {least} steps, or {best} for all")

    def _write(self, profiler: profile) -> None:
        """Write the trace and the table; the profiler calls it when it has traced its steps."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file: Path = self.folder / f"rank-{dist.rank()}"
        profiler.export_chrome_trace(f"{file}.json.gz")
        on_gpu = ProfilerActivity.CUDA in profiler.activities
        table = profiler.key_averages().table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=40,
            max_name_column_width=60,
        )
        file.with_suffix(".txt").write_text(table, encoding="utf-8")
        self.written = True
        say(f"trace: {file}.json.gz, for chrome://tracing or ui.perfetto.dev")
