"""What training measures of itself, and the trace of its steps."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch

from r2id.config import R2idRun, RiaeConfig, load_config
from r2id.training.loop import train
from r2id.training.meter import Meter, matmul_peak, peak_memory
from r2id.training.workload import Cost, Dimensions, Workload, image_cost
from tests.conftest import CONFIGS, TINY_R2ID, TINY_RIAE

RATES = {
    "images_per_second",
    "tokens_per_second",
    "tflops_per_process",
    "mfu",
    "data_wait",
    "memory_gib",
}


@pytest.mark.parametrize("latents", [None, "cache"])
def test_cost_of_an_image_counted_by_hand(latents: str | None) -> None:
    """Products of tokens and matrices, of queries and keys, and of scores and values."""
    config = load_config(
        CONFIGS / "digits" / "r2id.toml",
        [
            "r2id.width=32",
            "r2id.heads=2",
            "r2id.encoder_blocks=2",
            "r2id.decoder_blocks=1",
            "r2id.ffn_ratio=3",
        ],
    )
    assert isinstance(config, R2idRun)
    config = config.model_copy(update={"data": config.data.model_copy(update={"latents": latents})})
    riae = RiaeConfig(
        kind="attention",
        latent_channels=3,
        downsample=2.0,
        width=32,
        pixel_width=32,
        heads=2,
        gaussian_window=False,
        encoder_blocks=1,
        decoder_blocks=1,
    )
    found = image_cost(Workload(config, Dimensions((8, 12), 1, 5, riae)))
    tokens, width, r2id = 24, 32, config.r2id
    hidden = 64  # two thirds of 3 · 32, to the next multiple of 32
    fourier = 8 * (r2id.fourier[1] - r2id.fourier[0] + 1)
    times = 2 * (r2id.time_fourier[1] - r2id.time_fourier[0] + 1)
    seen = tokens + r2id.condition_tokens
    encoder, decoder = (
        count * (4 * width**2 + 3 * width * hidden + 2 * count * width) for count in (tokens, seen)
    )
    modulations = 3 * 6 * width**2 + width**2 + 2 * width**2  # blocks, the condition, the output
    ends = tokens * (3 + fourier) * width + tokens * width * 3 + times * width + width**2
    codec = 0
    if latents is None:
        seen, features = 96, 8 * (riae.fourier[1] - riae.fourier[0] + 1)
        pixels = seen * ((3 - 2 + features + 8) * width + width**2) + tokens * features * width
        ffn = 96  # two thirds of 4 · 32, to the next multiple of 32
        block = (
            tokens * 2 * width**2
            + seen * 2 * width**2
            + 2 * tokens * seen * width
            + tokens * 3 * width * ffn
        )
        codec = pixels + block + tokens * width * 3
    assert found == Cost(tokens, 2 * (3 * (2 * encoder + decoder + modulations + ends) + codec))


def test_rates_follow_from_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0, 6.0, 10.0, 12.0, 13.0, 14.0])
    monkeypatch.setattr("r2id.training.meter.time.perf_counter", lambda: next(clock))
    asked: list[tuple[int, int]] = []

    def cost(size: tuple[int, int]) -> Cost:
        asked.append(size)
        return Cost(size[0] * size[1], 10 * size[0])

    meter = Meter(torch.device("cpu"), cost, peak=100.0)  # at 0 s
    meter.lap("data")  # 1 s of data
    meter.add({"loss": torch.tensor(2.0), "part": torch.tensor([6.0, 3.0])}, 4, (2, 3))
    meter.lap("step")  # 3 s of a step
    more = {"loss": torch.tensor(4.0), "part": torch.tensor([5.0, 1.0]), "begun": torch.tensor(1.0)}
    meter.add(more, 2, (1, 1))
    found = meter.read()  # 1 s of a step, and 1 s of counting
    assert {key: found[key] for key in RATES - {"memory_gib"} | set(more)} == pytest.approx(
        {
            "loss": 3.0,
            "part": 11 / 4,
            "begun": 1.0,
            "images_per_second": 6 / 5,
            "tokens_per_second": 26 / 5,
            "tflops_per_process": 100 / 5 / 1e12,
            "mfu": 0.2,
            "data_wait": 0.2,
        }
    )
    meter.lap("pause")
    meter.add({"loss": torch.tensor(8.0), "part": torch.zeros(2)}, 6, (1, 1))
    meter.lap("data")  # 2 s
    again = meter.read()  # 1 s of a step
    assert (again["loss"], again["images_per_second"], again["data_wait"]) == pytest.approx(
        (8.0, 2.0, 2 / 3)
    )
    assert "part" not in again, "the mean over no image"
    whole = meter.summary()
    assert (whole["images_per_second"], whole["data_wait"]) == pytest.approx((12 / 8, 3 / 8))
    assert asked == [(2, 3), (1, 1)] or asked == [(1, 1), (2, 3)], "each size is counted once"


def test_figures_that_do_not_count_are_left_out_of_the_means() -> None:
    meter = Meter(torch.device("cpu"), lambda _: Cost(1, 1), peak=1.0)
    bad, figures = torch.tensor(math.nan), {"loss": torch.tensor(2.0), "part": torch.ones(2)}
    meter.add(figures, 1, (1, 1), torch.tensor(True))
    meter.add({"loss": bad, "part": bad.expand(2), "new": bad}, 1, (1, 1), torch.tensor(False))
    meter.add({**figures, "loss": torch.tensor(4.0)}, 1, (1, 1), torch.tensor(True))
    found = meter.read()
    assert (found["loss"], found["part"]) == (3.0, 1.0) and "new" not in found


def test_the_peak_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products, of 1 s and of ¼ s; the second ends after the time that is given to them."""
    clock = iter([0.0, 1.0, 1.0, 1.0, 1.25, 1.25])
    monkeypatch.setattr("r2id.training.meter.time.perf_counter", lambda: next(clock))
    found = matmul_peak(torch.device("cpu"), torch.float32)
    assert found == pytest.approx(2 * 1024**3 / 0.25)


def test_peak_memory_is_in_bytes() -> None:
    held = torch.ones(64 << 20, dtype=torch.uint8)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert held.nbytes < peak_memory(torch.device("cpu")) < memory


def test_training_reports_its_rates(digits, riae_run, latents, tmp_path: Path) -> None:
    riae = train(
        load_config(
            CONFIGS / "digits" / "riae.toml",
            [*TINY_RIAE, f"run={tmp_path / 'riae'}", f"data.shards={digits}", "train.steps=4"],
        )
    )
    r2id = train(
        load_config(
            CONFIGS / "digits" / "r2id.toml",
            [
                *TINY_R2ID,
                f"run={tmp_path / 'r2id'}",
                f"data.shards={digits}",
                f"codec={riae_run}",
                f"data.latents={latents}",
                "train.steps=4",
            ],
        )
    )
    for figures in (riae, r2id):
        assert set(figures) > RATES and all(figures[rate] > 0 for rate in RATES)
        assert figures["tokens_per_second"] == pytest.approx(16 * figures["images_per_second"]), (
            "8x8 pixels in cells of 2"
        )


def test_a_trace_has_ten_steps(digits, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    settings = [*TINY_RIAE, f"run={run}", f"data.shards={digits}", "train.preview_every=100"]
    train(
        load_config(
            CONFIGS / "digits" / "riae.toml", [*settings, "train.steps=4", "train.batch=16"]
        ),
        profile=True,
    )
    assert "6 steps" in capfd.readouterr().err and not (run / "profile").exists()
    train(
        load_config(
            CONFIGS / "digits" / "riae.toml", [*settings, "train.steps=24", "train.batch=16"]
        ),
        profile=True,
    )
    trace = json.loads(gzip.decompress((run / "profile" / "rank-0.json.gz").read_bytes()))
    steps = {
        event["name"] for event in trace["traceEvents"] if event["name"].startswith("ProfilerStep")
    }
    assert len(steps) == 10
    assert "aten::mm" in (run / "profile" / "rank-0.txt").read_text()
