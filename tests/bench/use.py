"""How long people wait: for the import, for r2id.Pipeline beside its sampler, and for the page.

    python tests/bench/use.py RUN [--port 7868]

The page is opened in headless Chromium, as tests/test_app.py does, and a width is typed in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # where tests/ is
from tests.test_app import Browser

REPEATS = 5


def timed(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    began = clock()
    work()
    return clock() - began


def measure_import() -> float:
    return min(
        timed(
            lambda: subprocess.run([sys.executable, "-c", "from r2id import Pipeline"], check=True)
        )
        for _ in range(REPEATS)
    )


def measure_pipeline(run: str) -> tuple[float, float]:
    """CPU seconds of 50 samples at 64×64: by the sampler, and by the pipeline, in turn."""
    import torch

    from r2id import Pipeline

    pipe = Pipeline.from_pretrained(run)
    classes = max(1, pipe.sampler.num_classes)
    labels = [number % classes if pipe.sampler.num_classes else -1 for number in range(50)]

    def plain() -> None:
        pipe.sampler.sample(torch.tensor(labels), torch.arange(50), (64, 64))

    def whole() -> None:
        pipe(labels, seeds=range(50), size=(64, 64))

    plain()
    clock = time.process_time
    pairs = [(timed(plain, clock), timed(whole, clock)) for _ in range(REPEATS)]
    sampler, pipeline = map(min, zip(*pairs, strict=True))
    return sampler, pipeline


def measure_page(run: str, port: int) -> tuple[list[float], list[float]]:
    """Seconds until the first picture of each visit, and until a picture of another width."""
    command = [sys.executable, "-m", "r2id.cli", "app", run, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        address = server.stdout.readline().strip()
        browser = Browser("about:blank")
        visits, drags = [], []
        for _ in range(REPEATS):
            began = time.perf_counter()
            browser.driver.get(address)
            height = len(browser.any_picture("picture"))
            visits.append(time.perf_counter() - began)
        for width in (64, 80, 96, 112, 120):
            began = time.perf_counter()
            browser.type("width", width)
            browser.picture("picture", (height, width))
            drags.append(time.perf_counter() - began)
        browser.driver.quit()
        server.terminate()
    return visits, drags


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=7868)
    options = parser.parse_args()
    print(f"from r2id import Pipeline: {measure_import():.2f} s")
    sampler, pipeline = measure_pipeline(options.run)
    print(f"50 samples of 64×64: sampler {sampler:.2f} CPU s, pipeline {pipeline:.2f}")
    visits, drags = measure_page(options.run, options.port)
    print(f"first picture: {visits[0]:.2f} s, on later visits {min(visits[1:]):.2f} s")
    print(f"another width: {max(drags):.2f} s at most")


if __name__ == "__main__":
    main()
