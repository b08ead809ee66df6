"""``r2id plan``: its memory against what real steps take, its arithmetic, and what it asks for."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from r2id.config import R2idRun, RiaeRun, load_config
from r2id.errors import InputError
from r2id.models.r2id import R2ID
from r2id.models.riae import RIAE
from r2id.models.tracing import trace_step
from r2id.training.communication import GPUS, Gpu
from r2id.training.losses.riae import riae_loss
from r2id.training.planner import (
    RUNTIME,
    describe,
    find_dimensions,
    largest_micro_batch,
    memory,
    plan,
)
from r2id.training.reading_rate import reading_rate
from r2id.training.recording import MOST
from r2id.training.workload import Dimensions, Workload, image_cost
from tests.conftest import CONFIGS
from tests.data.conftest import write_set

PHOTOS = CONFIGS / "imagenet"
DIGITS = CONFIGS / "digits"
R2ID_CASE = [
    str(PHOTOS / "r2id-b-256.toml"),
    "--riae",
    str(PHOTOS / "riae-256.toml"),
    "--classes",
    "10",
    "r2id.width=256",
    "r2id.heads=4",
    "r2id.encoder_blocks=4",
    "r2id.decoder_blocks=2",
]
SMALL_PHOTOS = CONFIGS / "photos" / "small-riae.toml"
SMALL = Gpu(name="small", memory=16, tflops=100, per_node=2, intra_node=20, inter_node=5)
RIAE_CASE = [str(PHOTOS / "riae-256.toml"), "riae.width=384"]


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="a process is measured by Linux's /proc"
)
@pytest.mark.parametrize(
    ("case", "zero", "processes", "checkpointing"),
    [
        (R2ID_CASE, "local", "1", ["none", "2"]),
        pytest.param(R2ID_CASE, "2", "2", ["none"], marks=pytest.mark.slow),
        (RIAE_CASE, "local", "1", ["none"]),
    ],
)
def test_memory_is_within_15_percent_of_what_real_steps_take(case, zero, processes, checkpointing):
    command = [
        sys.executable,
        "tests/bench/plan_memory.py",
        *case,
        "train.batch=4",
        "train.micro_batch=2",
        "--zero",
        zero,
        "--processes",
        processes,
        "--checkpointing",
        *checkpointing,
        "--json",
    ]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command,
        cwd=CONFIGS.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [part["checkpointing"] for part in found] == checkpointing
    for part in found:
        assert part["ratio"] == pytest.approx(1, abs=0.15), part


@pytest.mark.parametrize(
    ("path", "more"),
    [
        (SMALL_PHOTOS, ["loss.magnify=0.5", "loss.equivariance=0.25"]),
        (SMALL_PHOTOS, ["loss.equivariance=0.5", "loss.equivariance_scales=[0.5, 2]"]),
    ],
)
def test_no_kind_of_step_takes_more_memory_than_planned(path, more):
    """Of an autoencoder's steps some enlarge, some resize latents or images, others neither."""
    config = load_config(path, [*more, "train.precision=bfloat16"])
    assert isinstance(config, RiaeRun)
    work = Workload(config, Dimensions((64, 64), 1))

    def needed(step):
        def case():
            torch.manual_seed(0)
            module = riae_loss(RIAE(config.riae, config.data.channels), config.loss, config.seed)
            forward = module.forward
            module.forward = lambda image, index, step: forward(image, index, number)
            return module, work.inputs(4)

        number = step
        return trace_step(case, config.train.autocast).most()

    planned = work.trace(4, as_on_gpu=True).most()
    found = [needed(step) for step in range(8)]
    assert min(found) < 0.8 * planned and 0.8 * planned < max(found) < 1.1 * planned
    cost = image_cost(work)
    assert cost == image_cost(Workload(config.model_copy(update={"seed": 5}), work.dimensions))


def test_a_plan_says_what_a_run_comes_to():
    config = DIGITS / "r2id.toml"
    found = plan(
        config,
        ("data.size=[32, 32]",),
        gpus=4,
        gpu=SMALL,
        share=0.5,
        riae=DIGITS / "riae.toml",
        classes=10,
    )
    run, riae = load_config(config), load_config(DIGITS / "riae.toml")
    assert isinstance(run, R2idRun) and isinstance(riae, RiaeRun)
    model = R2ID(run.r2id, riae.riae.latent_channels, 10)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert (found["batch"], found["micro_batch"], found["accumulation"]) == (128, 32, 1)
    assert (found["image"], found["grid"], found["tokens"]) == ([32, 32], [16, 16], 256)
    # For each token a weight makes a product and a sum, and twice as many in the backward pass;
    # attention adds some.
    linear = sum(
        p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name
    )
    assert 0.5 < found["flops_per_step"] / (6 * linear * found["tokens"] * 128) < 2
    assert found["compute_seconds"] == pytest.approx(found["flops_per_step"] / (4 * 100e12 * 0.5))
    # ZeRO 1 reduces gradients to all, which is twice three quarters of them from each of four, and
    # gathers weights, over the links between two nodes, while nothing is computed.
    assert found["sent"] == pytest.approx(3 * 0.75 * 4 * found["parameters"], rel=1e-3)
    assert found["communication_seconds"] == pytest.approx(found["sent"] / 5e9)
    assert found["seconds_per_step"] == pytest.approx(
        found["compute_seconds"] + found["communication_seconds"]
    )
    assert found["days"] * 86400 == pytest.approx(run.train.steps * found["seconds_per_step"])
    assert found["images_per_second"] * found["seconds_per_step"] == pytest.approx(128)
    assert found["fits"] and found["largest_micro_batch"] == 32
    assert json.loads(json.dumps(found)) == found and len(describe(found)) == 8


def test_the_step_with_most_pixels_has_no_more_images_than_there_are(tmp_path: Path) -> None:
    """With data.batch_pixels: of 8x8 pixels, 704 images would fit into a step."""
    write_set(tmp_path, {"train": [(8, 8)] * 64 + [(24, 24)] * 80})
    changes = f"data.shards={tmp_path}", "train.batch=8", f"data.batch_pixels={79 * 24 * 24}"
    found = plan(DIGITS / "riae.toml", changes, gpus=1, gpu=SMALL, share=0.5)
    assert (found["image"], found["batch"]) == ([24, 24], 72)
    assert "step: 72 images on 1 × small, micro-batches of 72, 1 per step" in describe(found)[1]


def test_recordings_of_several_grids_are_counted(tmp_path: Path) -> None:
    """One more pass, and the gradients of each grid that is recorded, but one."""
    sizes = [(32, 32), (32, 16), (16, 32)]
    write_set(tmp_path, {"train": [size for size in sizes for _ in range(64)]})
    given = f"data.shards={tmp_path}", "train.batch=2", "data.max_pixels=1024"
    riae = DIGITS / "riae.toml"

    def needed(shapes: int, *changes: str, gpus: int = 1) -> dict[str, int]:
        config = load_config(DIGITS / "r2id.toml", [*given, *changes])
        assert isinstance(config, R2idRun)
        dimensions = find_dimensions(config, riae)
        assert dimensions.shapes == 3
        return memory(Workload(config, replace(dimensions, shapes=shapes)), gpus)

    found = {shapes: needed(shapes) for shapes in (1, 2, 4, 5, 9)}
    extra = {shapes: one.pop("recordings", 0) for shapes, one in found.items()}
    again = found[1]["activations"] + found[1]["gradients"]
    assert extra[1] == 0 and 0.8 * again < extra[2] <= 1.1 * again
    gradients = found[1]["weights"]
    for shapes, sets in {2: 0, 4: 2, 5: 3, 9: 3}.items():
        assert extra[shapes] == extra[2] + sets * gradients
        assert found[shapes] == found[1] | {"total": found[1]["total"] + extra[shapes]}
    for one in (
        needed(3, gpus=2),
        needed(3, "train.compile=true"),
        needed(3, "train.activation_checkpointing=all"),
    ):
        assert "recordings" not in one
    said = describe(plan(DIGITS / "r2id.toml", given, gpus=1, gpu=SMALL, share=0.5, riae=riae))
    assert "recordings 0." in said[2] and "steps of 3 shapes which share memory" in said[4]


def test_images_that_are_not_there_may_have_any_sizes(tmp_path: Path) -> None:
    missing = f"data.shards={tmp_path}", "train.batch=1", "data.max_pixels=256"
    for changes, shapes in {(): MOST + 1, ("data.size=[16, 16]",): 1}.items():
        found = plan(
            DIGITS / "r2id.toml",
            (*missing, *changes),
            gpus=1,
            gpu=SMALL,
            share=0.5,
            riae=DIGITS / "riae.toml",
            classes=10,
        )
        assert found["shapes"] == shapes
        assert any("shapes, assumed, which" in line for line in describe(found)) == (shapes > 1)


def test_what_limits_micro_batches_is_said() -> None:
    def told(gpus: int, *changes: str) -> str:
        run = ("data.size=[8, 8]", *changes)
        found = plan(DIGITS / "riae.toml", run, gpus=gpus, gpu=SMALL, share=0.5)
        return "\n".join(describe(found)[1:4])

    assert "train.micro_batch that fits: 16, a GPU's whole share of the batch" in told(4)
    cut = "micro-batches of 16 (train.micro_batch is 32, but 16 is a GPU's share of the batch), 1 "
    assert cut in told(4, "train.micro_batch=32")
    assert "micro-batches of 16, 4 per step" in told(1, "train.micro_batch=16")
    huge = told(1, f"data.size={[1024, 1024]}", "riae.width=512", "train.batch=64")
    assert re.search(r"that fits: \d+$", huge.splitlines()[-1]), huge


def test_a_size_that_nothing_tells_is_said_to_be_assumed(tmp_path: Path) -> None:
    assumed = f"of 256x256 pixels, assumed, as {tmp_path} has no shards yet"
    for changes, told in {(): True, ("data.size=[32, 32]",): False}.items():
        shards = f"data.shards={tmp_path}"
        found = plan(DIGITS / "riae.toml", (shards, *changes), gpus=1, gpu=SMALL, share=0.5)
        assert (assumed in describe(found)[0]) == told
        assert "1 × small" in describe(found)[1]


@pytest.mark.parametrize(
    ("name", "riae", "gpus", "gpu"),
    [
        ("imagenet/r2id-b-256", "imagenet/riae-256", 8, "h100"),
        ("imagenet/r2id-xl-256", "imagenet/riae-256", 8, "h100"),
        ("mnist/reference-r2id", "mnist/reference-riae", 1, "rtx5080"),
    ],
)
def test_copying_states_to_the_host_costs_little_of_the_time_between_saves(
    name: str, riae: str, gpus: int, gpu: str
) -> None:
    """So checkpoints need no pinned memory, which would be held from one to the next."""
    path = CONFIGS / f"{name}.toml"
    found = plan(
        path, (), gpus=gpus, gpu=GPUS[gpu], share=0.5, riae=CONFIGS / f"{riae}.toml", classes=10
    )
    # The busiest process copies all weights, and its share of both moments and of the average, to
    # pageable memory at 3 GB/s, a tenth of the 32 GB/s of PCIe 4.
    copied = 4 * found["parameters"] * (1 + 3 / gpus)
    between = found["seconds_per_step"] * load_config(path).train.save_every
    assert copied / 3e9 < 0.02 * between


def test_workers_are_counted_from_what_one_reads(digits, tmp_path):
    data = load_config(DIGITS / "riae.toml", [f"data.shards={digits}"]).data
    rate, measured = reading_rate(data, 1, 1)
    assert measured and rate > 1000  # 8x8 pixels that are kept in memory
    missing = data.model_copy(update={"shards": tmp_path})
    assert reading_rate(missing, 256 * 256, 1) == (pytest.approx(153, abs=1), False)
    cached = missing.model_copy(update={"latents": tmp_path})
    assert reading_rate(cached, 1, 16 * 16 * 64) == (pytest.approx(6100, abs=10), False)
    found = plan(PHOTOS / "riae-256.toml", ("train.batch=8",), gpus=8, gpu=GPUS["h100"], share=0.4)
    loading = found["loading"]
    assert loading["needed"] == pytest.approx(found["images_per_second"] / 8)
    assert loading["workers"] == math.ceil(loading["needed"] / loading["per_worker"])


def test_without_a_condition_nobody_asks_for_classes():
    found = plan(
        DIGITS / "r2id.toml",
        ('r2id.condition="none"', "data.size=[8, 8]"),
        gpus=1,
        gpu=SMALL,
        share=0.5,
        riae=DIGITS / "riae.toml",
    )
    run = load_config(DIGITS / "r2id.toml", ('r2id.condition="none"',))
    assert isinstance(run, R2idRun)
    assert found["parameters"] == sum(p.numel() for p in R2ID(run.r2id, 4, 0).parameters())


def test_the_largest_micro_batch_is_the_largest_that_fits():
    config, riae = load_config(DIGITS / "r2id.toml"), load_config(DIGITS / "riae.toml")
    assert isinstance(config, R2idRun) and isinstance(riae, RiaeRun)
    dimensions = Dimensions((64, 64), 1, 10, riae.riae)

    def needs(size: int) -> int:
        train = config.train.model_copy(update={"micro_batch": size})
        return (
            memory(Workload(config.model_copy(update={"train": train}), dimensions), 1)["total"]
            + RUNTIME
        )

    limit = (needs(16) + needs(32)) / 2
    assert largest_micro_batch(config, dimensions, 1, limit) == 16
    assert largest_micro_batch(config, dimensions, 1, 2e9) is None


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (DIGITS / "r2id.toml", {"riae": DIGITS / "riae.toml"}, "data.shards.*--classes"),
        (DIGITS / "r2id.toml", {"classes": 10}, "codec.*--riae"),
        (DIGITS / "r2id.toml", {"classes": 10, "riae": DIGITS / "r2id.toml"}, "'r2id'.*'riae'"),
        (DIGITS / "riae.toml", {"gpus": 7}, r"train\.batch\b.*\b64\b.*\b63\b"),
    ],
)
def test_what_a_plan_cannot_know_is_asked_for(config, options, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # where nothing has been prepared or trained
    with pytest.raises(InputError, match=message):
        plan(config, (), **{"gpus": 1, "gpu": SMALL, "share": 0.4, **options})
