"""The training loop as a user runs it: to the end, stopped, resumed, and refused."""

import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from itertools import pairwise

import psutil
import pytest
import torch

from r2id import cli
from r2id.checkpoints import Checkpoint
from r2id.config import load_config
from r2id.errors import LOADER_KILLED, InputError
from r2id.models import lattice
from r2id.models.layers import FeedForward
from r2id.training.loop import train
from r2id.training.step import learning_rate
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training import children, loop_ranks
from tests.training.configs import (
    assert_same,
    attention_config,
    r2id_config,
    riae_config,
    without_cache,
)
from tests.waiting import wait_until


@pytest.fixture
def computed_blocks(monkeypatch):
    """Counts how often each block is computed for a gradient: a block on the latent grid, or the
    feed-forward layer of one by attention."""
    calls = Counter()

    def counted(forward):
        def count(self, x):
            calls[self] += torch.is_grad_enabled()
            return forward(self, x)

        return count

    for part in (FeedForward, lattice.Block):
        monkeypatch.setattr(part, "forward", counted(part.forward))
    return calls


def test_the_averages_follow_the_weights_at_every_step(digits, tmp_path):
    """From saved step to saved step: average ← decay·average + (1 − decay)·weights."""
    every = ("train.steps=4", "train.save_every=1", "train.keep=4", "train.ema=0.9")
    train(riae_config(digits, tmp_path / "run", *every))
    saved = [
        Checkpoint.open(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
        for step in range(1, 5)
    ]
    for step, (before, after) in enumerate(pairwise(saved), start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        average, weights = after.tensors("ema"), after.tensors("model")
        for name, old in before.tensors("ema").items():
            expected = torch.lerp(old, weights[name], 1 - decay)
            torch.testing.assert_close(average[name], expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(average[name], weights[name]) for name in weights)


def test_learning_rate_warms_up_and_ends_where_it_should(digits, tmp_path):
    optim = riae_config(
        digits, tmp_path, "optim.lr=1.0", "optim.lr_end=0.1", "optim.warmup=4"
    ).optim
    rates = [learning_rate(step, optim, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and rates[4] == 1.0
    assert rates[-1] == pytest.approx(0.1) and rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[9] == pytest.approx(0.1 + 0.9 * 0.75), "a third of the way: (1 + cos 60°) / 2"


@pytest.mark.parametrize("stage", ["riae", "attention", "r2id"])
def test_resumed_equals_uninterrupted_bit_for_bit(stage, digits, riae_run, tmp_path):
    """Dropout, jitter, noise, clouds, data order, Adam and the average go on as if untouched."""

    def config(run, *more):
        more = (
            "train.steps=12",
            "train.save_every=5",
            "train.keep=9",
            "train.micro_batch=16",
            *more,
        )
        if stage == "riae":
            return riae_config(digits, run, *more, "loss.magnify=0.4", "loss.equivariance=0.3")
        if stage == "attention":
            return attention_config(digits, run, *more)
        return without_cache(r2id_config(digits, riae_run, run, "r2id.dropout=0.2", *more))

    train(config(tmp_path / "whole"))
    train(config(tmp_path / "parts"))
    # Back to step 5, as after a crash at step 7.
    for folder in (tmp_path / "parts" / "checkpoints").glob("step-*"):
        if folder.name != "step-00000005":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    result = train(config(tmp_path / "parts"))
    assert result["step"] == 12
    assert_same(tmp_path / "whole", tmp_path / "parts")


def test_stopped_at_ten_random_steps_amid_accumulation_bit_for_bit(digits, tmp_path):
    """A signal that comes amid a step is acted on at its end: no checkpoint holds a part of one."""
    result = loop_ranks.stopped_at(loop_ranks.STOPS, digits, tmp_path, rank=0)
    assert not result["differ"]
    assert result["saved"] == [[step, step * 64] for step in [*loop_ranks.STOPS, loop_ranks.STEPS]]
    assert all(
        f"step {step} of" in said
        for step, said in zip(loop_ranks.STOPS, result["said"], strict=True)
    )


@pytest.mark.parametrize("config", [riae_config, attention_config])
def test_recomputed_activations_change_nothing(config, digits, tmp_path, computed_blocks):
    """Of all blocks, and of every other one."""
    calls = {}
    for mode in ("none", "all", "2"):
        computed_blocks.clear()
        blocks = ("riae.encoder_blocks=2", "riae.decoder_blocks=2", "train.steps=3")
        run = tmp_path / mode
        train(config(digits, run, *blocks, f"train.activation_checkpointing={mode}"))
        calls[mode] = sum(computed_blocks.values())
        assert_same(tmp_path / "none", run)
    assert calls["none"] >= 3 * 4, "each block in each step"
    assert calls["all"] == 2 * calls["none"] and calls["2"] == 1.5 * calls["none"]


def test_cache_and_on_the_fly_train_alike(digits, riae_run, latents, tmp_path):
    cached = train(
        r2id_config(
            digits, riae_run, tmp_path / "cached", "train.steps=8", f"data.latents={latents}"
        )
    )
    flying = train(
        without_cache(r2id_config(digits, riae_run, tmp_path / "flying", "train.steps=8"))
    )
    assert cached["loss"] == pytest.approx(flying["loss"], rel=1e-4)
    for name, tensor in Checkpoint.open(tmp_path / "cached").tensors("model").items():
        torch.testing.assert_close(
            tensor,
            Checkpoint.open(tmp_path / "flying").tensors("model")[name],
            atol=2e-4,
            rtol=0.01,
        )


def test_a_finished_run_is_left_alone(r2id_run, capsys):
    """And says which settings have changed since."""
    before = Checkpoint.open(r2id_run).identity
    meta = Checkpoint.open(r2id_run).meta
    for overrides in ((), ("sample.steps=7", "train.precision=auto")):
        assert "finished" not in capsys.readouterr().err
        result = train(load_config(r2id_run / "config.toml", overrides))
        assert result["step"] == meta.step and Checkpoint.open(r2id_run).identity == before
    steps = meta.config["sample"]["steps"]
    changed = f"with other settings than before: sample.steps = {steps} → 7\n"
    assert capsys.readouterr().err.endswith(f"finished at step {meta.step}, {changed}")


def test_losses_fall_and_pictures_are_drawn(digits, tmp_path):
    run = tmp_path / "run"
    config = riae_config(digits, run, "start=random", "train.steps=80", "train.preview_every=40")
    first = train(riae_config(digits, tmp_path / "first", "start=random", "train.steps=1"))
    last = train(config)
    assert last["loss"] < 0.6 * first["loss"]
    assert {file.name for file in (run / "samples").iterdir()} == {
        "step-00000040.png",
        "step-00000080.png",
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("riae.width=64", r"riae\.width\b.*\b32\b.*\b64"),
        ("seed=1", r"seed\b.*\b0\b.*\b1"),
        ("train.batch=64", r"train\.batch\b.*\b32\b.*\b64"),
    ],
)
def test_another_run_s_directory_is_refused(override, message, digits, riae_run):
    config = load_config(riae_run / "config.toml", ["train.steps=99", override])
    with pytest.raises(InputError, match=message):
        train(config)


def test_a_codec_of_the_wrong_stage_is_refused(digits, r2id_run, tmp_path):
    with pytest.raises(InputError, match=r"'r2id'.*'riae'"):
        train(without_cache(r2id_config(digits, r2id_run, tmp_path / "run")))


@contextmanager
def started(said, digits, run):
    """A run in a process of its own that has saved; what it says goes to the file ``said``."""
    command = [
        "train",
        CONFIGS / "digits" / "riae.toml",
        *TINY_RIAE,
        f"run={run}",
        f"data.shards={digits}",
        "train.steps=100000",
        "train.save_every=1",
    ]
    with children.ended(children.start(children.command_apart, said, *command)) as process:
        wait_until(
            lambda: Checkpoint.open_newest(run) is not None,
            alive=process,
            said=lambda: said.is_file() and said.read_text(),
        )
        yield process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(number, digits, tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    with started(said, digits, run) as process:
        os.kill(process.pid, number)
        process.join(60)
    assert process.exitcode == 75, said.read_text()
    step = Checkpoint.open(run).step
    assert step >= 1 and f"step {step} of 100000" in said.read_text()
    again = train(load_config(run / "config.toml", [f"train.steps={step + 2}"]))
    assert again["step"] == step + 2


def test_a_terminal_that_is_closed_saves(digits, tmp_path):
    """It sends SIGHUP, and whatever is then written to it fails, as to a pipe without a reader."""
    said = tmp_path / "said"
    os.mkfifo(said)
    terminal = os.open(said, os.O_RDONLY | os.O_NONBLOCK)
    with started(said, digits, tmp_path / "run") as process:
        os.close(terminal)
        os.kill(process.pid, signal.SIGHUP)
        process.join(60)
    assert process.exitcode == 75


def trains(folder):
    """Whether a run has saved, or said how far it is, which it does after five seconds."""
    saved = Checkpoint.open_newest(folder / "run") is not None
    return saved or "train riae: " in (folder / "said").read_text()


@pytest.fixture(params=["train.save_every=1"])
def job(request, digits, tmp_path):
    """A run with a loader process, in a session of its own, that trains.

    Each time that it saves, it starts one more to measure latents.
    """
    command = [
        *(sys.executable, "-m", "r2id.cli", "train", CONFIGS / "digits" / "riae.toml"),
        *TINY_RIAE,
        f"run={tmp_path / 'run'}",
        f"data.shards={digits}",
        "data.workers=1",
        "train.steps=100000",
        request.param,
        "start=random",
    ]
    with (tmp_path / "said").open("w") as said:
        process = psutil.Popen(command, stderr=said, start_new_session=True)
    try:
        wait_until(lambda: trains(tmp_path), alive=process, said=(tmp_path / "said").read_text)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_to_the_whole_job_leaves_it_its_loaders(number, job, tmp_path):
    """As timeout, systemd and a terminal send them."""
    loaders = job.children()
    os.killpg(job.pid, number)
    assert job.wait(60) == 75, (tmp_path / "said").read_text()
    assert (tmp_path / "said").read_text().count("stopping at the end") == 1
    assert loaders and not psutil.wait_procs(loaders, 5)[1]  # two, if it was saving


def test_loaders_end_with_a_killed_run(job):
    loaders = job.children()
    job.kill()
    assert not psutil.wait_procs(loaders, 20)[1]


@pytest.mark.parametrize("job", ["train.save_every=1000000"], indirect=True)
def test_a_killed_loader_is_one_line(job, tmp_path):
    job.children()[0].kill()
    assert job.wait(60) == 1
    said = (tmp_path / "said").read_text()
    assert said.splitlines()[-1].startswith("failed: a loader process was killed, perhaps for lack")
    assert "Traceback" not in said


def test_nothing_is_said_after_a_killed_loader(capfd):
    """Torch's handler raises in whatever code comes next when a child process ends."""

    def tell(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    before = signal.signal(signal.SIGCHLD, tell)
    try:
        with pytest.raises(SystemExit, match="1"):
            cli._fail(LOADER_KILLED)
        subprocess.run(["true"], check=True)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert capfd.readouterr().err == f"failed: {LOADER_KILLED}\n"
