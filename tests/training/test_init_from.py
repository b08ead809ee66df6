"""``init_from``: a run that begins with another run's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from r2id import dist
from r2id.checkpoints import Checkpoint
from r2id.config import RiaeRun
from r2id.config.batch_split import micro_batch_size
from r2id.errors import InputError
from r2id.models.codec import Codec
from r2id.training.engines import make_engine
from r2id.training.loop import train
from r2id.training.resume import restore
from r2id.training.state import TrainState
from r2id.training.tasks import make_task
from tests.training.configs import riae_config


def start(config: RiaeRun) -> TrainState:
    """The state that the first step of a run begins with."""
    world = dist.init()
    task = make_task(config, world, micro_batch_size(config.train, 1))
    engine = make_engine(
        task.module, optim=config.optim, train=config.train, engine=config.engine, world=world
    )
    state = TrainState(task, engine)
    restore(state, Checkpoint.open_newest(config.run))
    return state


def test_it_begins_with_the_averaged_weights_and_all_else_is_new(
    digits: Path, riae_run: Path, tmp_path: Path
) -> None:
    more = "optim.lr=1e-4", "train.ema_profiles=[0.05,0.1]", "data.flip=true"
    state = start(riae_config(digits, tmp_path / "run", f"init_from={riae_run}", *more))
    assert (state.start, state.step, state.samples, state.engine.steps) == (0, 0, 0, 0)
    found = state.engine.state()
    for name, value in Checkpoint.open(riae_run).tensors("ema").items():
        for kind in ("model", "ema", "ema-0.1"):
            assert torch.equal(found.parts[kind][name].values, value), f"{kind} {name}"
    assert not any(bool(part.values.any()) for part in found.parts["optimizer"].values())


def test_a_resumed_run_goes_on_from_its_own(digits: Path, riae_run: Path, tmp_path: Path) -> None:
    for steps in (2, 3):
        config = riae_config(
            digits, tmp_path / "run", f"init_from={riae_run}", f"train.steps={steps}"
        )
        assert train(config)["step"] == steps
        if steps == 2:
            own = Checkpoint.open(config.run).tensors("model")
    state = start(config.model_copy(update={"train": config.train.model_copy(update={"steps": 9})}))
    assert state.step == 3
    now = state.engine.state().parts["model"]
    others = Checkpoint.open(riae_run).tensors("ema")
    moved = [name for name, value in others.items() if not torch.equal(now[name].values, value)]
    assert moved and any(not torch.equal(now[name].values, own[name]) for name in own)


def test_a_frozen_encoder_leaves_latents_as_they_were(
    digits: Path, riae_run: Path, tmp_path: Path
) -> None:
    more = f"init_from={riae_run}", "loss.freeze_encoder=true", "train.steps=2", "train.ema=0.5"
    train(riae_config(digits, tmp_path / "run", *more))
    before, after = (Codec.load(run).model for run in (riae_run, tmp_path / "run"))
    images = torch.rand(2, 1, 9, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = before.encode(images)
    assert torch.equal(latents, after.encode(images))
    assert not torch.equal(before.decode(latents, (9, 7)), after.decode(latents, (9, 7)))


def test_a_frozen_encoder_has_been_trained(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"loss\.freeze_encoder = true: needs init_from"):
        riae_config(digits, tmp_path / "run", "loss.freeze_encoder=true")


def test_another_architecture_is_refused(digits: Path, riae_run: Path, tmp_path: Path) -> None:
    config = riae_config(digits, tmp_path / "run", f"init_from={riae_run}", "riae.width=64")
    with pytest.raises(InputError) as raised:
        train(config)
    said = str(raised.value)
    assert str(riae_run) in said and "riae.width = 32" in said and "64" in said
    assert not config.run.exists(), "nothing was begun"


def test_weights_of_cells_that_are_not_lapped_are_refused(
    digits: Path, riae_run: Path, tmp_path: Path
) -> None:
    """Their shapes fit, and what they code does not."""
    config = riae_config(digits, tmp_path / "run", f"init_from={riae_run}", "riae.lapped=false")
    with pytest.raises(InputError, match=r"riae\.lapped = True there and False here"):
        start(config)


def test_another_stage_is_refused(digits: Path, r2id_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'r2id'"):
        train(riae_config(digits, tmp_path / "run", f"init_from={r2id_run}"))


def test_a_place_without_a_checkpoint_is_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        train(riae_config(digits, tmp_path / "run", f"init_from={tmp_path / 'nowhere'}"))
