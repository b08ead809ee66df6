"""A trace of some training steps, by torch's profiler."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

from r2id import dist
from r2id.progress import say

_SKIPPED, _WARM, _TRACED = 3, 2, 10


class Profile:
    """Within this block ``step`` is called after every training step: ten of them are traced, after five for warming up.

    Every process writes FOLDER/rank-R.json.gz, for chrome://tracing or https://ui.perfetto.dev, and FOLDER/rank-R.txt, the
    operations that took the longest.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.profile = profile(
            activities=supported_activities(),
            on_trace_ready=self._write,
            schedule=schedule(skip_first=_SKIPPED, wait=0, warmup=_WARM, active=_TRACED, repeat=1),
        )
        self.written = False

    def __enter__(self) -> Profile:
        self.profile.start()
        return self

    def step(self) -> None:
        self.profile.step()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.profile.stop()
        if not self.written and kind is None:
            say(
                f"nothing was traced: that takes {_SKIPPED + _WARM + 1} steps, better {_SKIPPED + _WARM + _TRACED}"
            )

    def _write(self, found: profile) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"rank-{dist.rank()}"
        found.export_chrome_trace(str(self.folder / f"{name}.json.gz"))
        on_gpu = ProfilerActivity.CUDA in found.activities
        table = found.key_averages().table(
            sort_by="self_cuda_time_total" if on_gpu else "self_cpu_time_total",
            row_limit=40,
            max_name_column_width=60,
        )
        (self.folder / f"{name}.txt").write_text(table)
        self.written = True
        say(f"trace: {self.folder / name}.json.gz, for chrome://tracing or ui.perfetto.dev")
