"""Losses and gradients that are not finite, steps that never end, blocks that are prepared."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from r2id.checkpoints import Checkpoint, reading
from r2id.cli.training import _train_lines
from r2id.config import TrainConfig, load_config
from r2id.errors import InputError, NonFiniteError
from r2id.training.callbacks import watchdog
from r2id.training.engines import LocalEngine
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.configs import assert_same, riae_config


@pytest.fixture
def spoil(monkeypatch):
    """Let something happen in the forward pass of given steps."""

    def install(steps, how):
        forward = WindowLoss.forward

        def spoilt(self, *args, **batch):
            if batch["step"] in steps:
                return how(self, lambda: forward(self, *args, **batch))
            return forward(self, *args, **batch)

        monkeypatch.setattr(WindowLoss, "forward", spoilt)

    return install


def nan_loss(_module, run):
    loss, figures = run()
    return loss * float("nan"), figures


def nan_parameter(module, run):
    with torch.no_grad():
        module.model.decoder_blocks[0].norm.weight[3] = float("nan")
    return run()


def infinite_gradient(_module, run):
    loss, figures = run()
    return loss + (loss - loss.detach()) * 3e38 * 3e38, figures


HOWS = {
    "loss": (nan_loss, "the loss "),
    "parameter": (nan_parameter, r"parameter decoder_blocks\.0\."),
    "gradient": (infinite_gradient, "backward"),
}


@pytest.mark.parametrize(("how", "words"), HOWS.values(), ids=HOWS.keys())
def test_it_is_stopped_before_the_update_and_the_place_is_named(
    digits, tmp_path, spoil, how, words
):
    spoil({7}, how)
    with pytest.raises(
        NonFiniteError,
        match=rf"step 7: .*{words}.*samples train-\d+, train-\d+, train-\d+, … \(32\)",
    ):
        train(riae_config(digits, tmp_path / "run", "train.steps=12", "train.save_every=5"))
    found = Checkpoint.open(tmp_path / "run")
    assert found.step == 5
    for kind in ("model", "ema"):
        assert all(torch.isfinite(value).all() for value in found.tensors(kind).values())


def test_a_module_that_makes_it_is_named(digits, tmp_path, monkeypatch):
    from r2id.models.riae import RIAE

    build = RIAE.__init__

    def with_fault(self, *args, **options):
        build(self, *args, **options)
        self.decoder_blocks[0].register_forward_hook(
            lambda module, _, output: output / 0 if isinstance(output, torch.Tensor) else output
        )

    monkeypatch.setattr(RIAE, "__init__", with_fault)
    with pytest.raises(NonFiniteError, match=r"step 0: .*module decoder_blocks\.0 "):
        train(riae_config(digits, tmp_path / "run", "train.steps=3"))


def test_some_steps_may_be_left_out(digits, tmp_path, spoil, capfd):
    spoil({3, 5}, nan_loss)
    result = train(
        riae_config(
            digits, tmp_path / "run", "train.steps=8", "train.skip_nonfinite=2", "train.log_every=1"
        )
    )
    said = capfd.readouterr().err
    assert result["step"] == 8 and result["loss"] == result["loss"]
    assert result["skipped_steps"] == 2 and "step 8 (2 skipped), loss" in _train_lines(result)[0]
    assert [
        "step 3" in line or "step 5" in line for line in said.splitlines() if "skipped" in line
    ] == [True, True]
    with pytest.raises(NonFiniteError, match="step 5"):
        train(riae_config(digits, tmp_path / "other", "train.steps=8", "train.skip_nonfinite=1"))


def test_a_checkpoint_that_fails_at_once_is_not_gone_on_from_for_ever(digits, tmp_path, spoil):
    """The weights may have diverged before it was saved; it says what to do then."""
    spoil({3}, nan_loss)
    settings = (digits, tmp_path / "run", "train.steps=6", "train.save_every=2")
    with pytest.raises(NonFiniteError, match="step 3: ") as fault:
        train(riae_config(*settings))
    assert "first step after" not in str(fault.value)
    spoil({2}, nan_loss)
    with pytest.raises(
        NonFiniteError, match=r"first step after the checkpoint of step 2: .*remove"
    ):
        train(riae_config(*settings))


def test_a_step_left_out_changes_nothing(digits, tmp_path, spoil):
    """Weights and moments after a step that is left out are those before it."""
    train(
        riae_config(
            digits,
            tmp_path / "short",
            "train.steps=6",
            "optim.warmup=0",
            "optim.lr=1e-3",
            "optim.lr_end=1e-3",
        )
    )
    spoil({6}, nan_loss)
    train(
        riae_config(
            digits,
            tmp_path / "long",
            "train.steps=7",
            "optim.warmup=0",
            "optim.lr=1e-3",
            "optim.lr_end=1e-3",
            "train.skip_nonfinite=1",
        )
    )
    assert_same(tmp_path / "short", tmp_path / "long")


def test_a_run_goes_on_after_a_step_left_out_as_if_never_stopped(digits, tmp_path, spoil):
    spoil({1}, nan_loss)
    settings = ("train.steps=8", "train.skip_nonfinite=1", "train.save_every=4", "start=random")
    whole, parts = (riae_config(digits, tmp_path / name, *settings) for name in ("whole", "parts"))
    train(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000008")
    train(parts)
    assert_same(tmp_path / "whole", tmp_path / "parts")


@pytest.fixture
def late(monkeypatch):
    """The engine finds out late, as on a GPU: at the next step, or when its state is read."""
    begin = LocalEngine.__init__

    def begin_late(self, *args):
        begin(self, *args)
        self.late = True

    monkeypatch.setattr(LocalEngine, "__init__", begin_late)


STEPS = ("train.steps=8", "train.save_every=4", "train.keep=9")


def test_steps_found_out_late_are_left_out_where_the_state_is_saved_and_at_the_end(
    digits, tmp_path, spoil, late, capfd
):
    """Steps 3 and 7 are followed by a checkpoint; 5 is found out at the next step."""
    spoil({3, 5, 7}, nan_loss)
    profiles = ("train.ema_profiles=[0.1]", "train.ema_snapshot_every=4")
    settings = (*STEPS, *profiles, "train.skip_nonfinite=3")
    assert train(riae_config(digits, tmp_path / "late", *settings))["step"] == 8
    said = [line for line in capfd.readouterr().err.splitlines() if "skipped" in line]
    assert [line.split(": ")[1] for line in said] == ["step 3", "step 5", "step 7"]
    assert all("the loss" in line and "samples train-" in line for line in said)
    for found in reading.list_checkpoints(tmp_path / "late" / "checkpoints"):
        for kind in ("model", "ema", "optimizer"):
            values = Checkpoint.open(found).tensors(kind).values()
            assert all(torch.isfinite(value).all() for value in values), kind


def test_what_is_found_out_late_leaves_the_same_weights(digits, tmp_path, spoil, request):
    spoil({3, 5, 7}, nan_loss)
    train(riae_config(digits, tmp_path / "at once", *STEPS, "train.skip_nonfinite=3"))
    request.getfixturevalue("late")
    figures = train(riae_config(digits, tmp_path / "late", *STEPS, "train.skip_nonfinite=3"))
    assert math.isfinite(figures["loss"]), "the mean of the steps that were made"
    for kind in ("model", "optimizer"):
        found = Checkpoint.open(tmp_path / "late").tensors(kind)
        for name, value in Checkpoint.open(tmp_path / "at once").tensors(kind).items():
            assert torch.equal(value, found[name]), f"{kind} {name}"


@pytest.mark.parametrize("step", [3, 7])
def test_what_is_found_out_late_stops_a_run_before_it_is_saved(step, digits, tmp_path, spoil, late):
    spoil({step}, nan_loss)
    with pytest.raises(NonFiniteError, match=rf"step {step}: .*the loss .*samples train-\d+"):
        train(riae_config(digits, tmp_path / "run", *STEPS))
    kept = reading.list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [found.name for found in kept] == (["step-00000004"] if step == 7 else [])


STALL = """
import os, sys, time
from pathlib import Path
from r2id.config import TrainConfig, load_config
from r2id.training import loop
from r2id.training.losses.windows import WindowLoss
forward = WindowLoss.forward
def sleepy(self, *args, **batch):
    if batch["step"] == 3 and os.environ["RANK"] == "1":
        time.sleep(600)
    return forward(self, *args, **batch)
WindowLoss.forward = sleepy
loop.train(load_config(Path(sys.argv[1]), sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_rank_that_sleeps_ends_the_job_with_its_stack(digits, tmp_path):
    """Two processes under DeepSpeed, of which one sleeps while the other waits for its gradient."""
    (tmp_path / "rank.py").write_text(STALL)
    command = [
        sys.executable,
        "-m",
        "r2id.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "rank.py"),
        str(CONFIGS / "digits" / "riae.toml"),
        *TINY_RIAE,
        f"run={tmp_path / 'run'}",
        f"data.shards={digits}",
        "train.stall_seconds=4",
        "train.save_every=2",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": str(root),
        },
    )
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:04)!" in done.stderr and "in sleepy" in done.stderr
    newest = reading.find_checkpoint(tmp_path / "run")
    assert Checkpoint.open(newest).step == 2 and not reading.find_damages(newest)


def test_the_watchdog_leaves_those_alone_that_move(monkeypatch):
    """Its timer never runs out while there are steps, and is stopped at the end."""
    now, ends = 0.0, None

    def start_timer(seconds, exit, file):
        nonlocal ends
        assert exit
        ends = now + seconds

    def stop_timer():
        nonlocal ends
        ends = None

    timer = {"dump_traceback_later": start_timer, "cancel_dump_traceback_later": stop_timer}
    monkeypatch.setattr(watchdog, "faulthandler", SimpleNamespace(**timer))
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: now))
    for limit in (0.5, 0):
        train = TrainConfig(steps=1, stall_seconds=limit)
        state = SimpleNamespace(config=SimpleNamespace(train=train))
        callback = watchdog.Watchdog()
        callback.pre_train(state)
        for length in (0.001, 0.04, 0.2, 0.44, 0.04, 0.44, 0.2):
            now += length
            assert ends is None if limit == 0 else now < ends
            callback.post_step(state)
        callback.close(state, None)
        assert ends is None


def test_activation_checkpointing_of_every_block_is_called_all(digits, tmp_path):
    with pytest.raises(InputError, match="activation_checkpointing"):
        riae_config(digits, tmp_path, "train.activation_checkpointing=1")


def test_offload_needs_a_stage_that_shards(digits, tmp_path):
    with pytest.raises(InputError, match=r"'all'.*zero_stage.*1"):
        load_config(CONFIGS / "digits" / "riae.toml", ["engine.offload=all"])
