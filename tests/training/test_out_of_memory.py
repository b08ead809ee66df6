"""Memory that runs out becomes one line, which says what to change, with numbers from the plan."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from r2id.config import RiaeRun, load_config
from r2id.errors import WorkError
from r2id.models.codec import Codec
from r2id.sampling.sampler import Sampler
from r2id.training import out_of_memory
from r2id.training.loop import train
from r2id.training.losses.windows import WindowLoss
from r2id.training.planner import RUNTIME, find_dimensions, memory
from r2id.training.workload import Workload
from tests.conftest import CONFIGS, TINY_RIAE
from tests.training.configs import r2id_config, riae_config, without_cache

TORCH_SAYS = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 16 GiB"


def run_out(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError(TORCH_SAYS)


def needs(config: RiaeRun, gpus: int = 1, **changes: Any) -> int:
    changed = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    return memory(Workload(changed, find_dimensions(config)), gpus)["total"] + RUNTIME


def test_training_names_the_settings_that_fit(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that holds micro-batches of 8, and the run asks for 32."""
    config = riae_config(digits, tmp_path / "run")
    limit = (needs(config, micro_batch=8) + needs(config, micro_batch=16)) // 2
    monkeypatch.setattr(out_of_memory, "memory_of", lambda _device: limit)
    forward = WindowLoss.forward

    def forward_or_run_out(self: WindowLoss, *args: Any, **batch: Any) -> Any:
        return run_out() if batch["step"] == 2 else forward(self, *args, **batch)

    with monkeypatch.context() as patch, pytest.raises(WorkError) as raised:
        patch.setattr(WindowLoss, "forward", forward_or_run_out)
        train(config)
    said = str(raised.value)
    assert said.startswith(f"out of memory, {limit / 1e9:.1f} GB in all: ") and "\n" not in said
    assert "with micro-batches of 32;" in said
    assert f"train.micro_batch=8 ({needs(config, micro_batch=8) / 1e9:.2f} GB)" in said


def test_a_model_that_a_cpu_cannot_hold_is_one_line(digits: Path, tmp_path: Path) -> None:
    """One of its matrices takes 144 TB, more than any process can address."""
    config = riae_config(digits, tmp_path / "run", "riae.width=3000000", "start=random")
    with pytest.raises(WorkError, match=r"^out of memory, \d.* GB in all: r2id plan says \d+.* GB"):
        train(config)


def test_several_gpus_are_offered_stages_that_shard(digits: Path, tmp_path: Path) -> None:
    config = load_config(
        CONFIGS / "digits" / "riae.toml",
        [*TINY_RIAE, f"run={tmp_path}", f"data.shards={digits}", "train.micro_batch=1"],
    )
    assert isinstance(config, RiaeRun)
    dimensions = find_dimensions(config)
    said = out_of_memory.advise(config, dimensions, 8, 80 * 10**9)
    assert "others may hold the rest" in said and "micro_batch=" not in said
    assert re.search(r"engine.zero_stage=2 \(\d+\.\d\d GB\)", said), said
    alone = out_of_memory.advise(config, dimensions, 1, 80 * 10**9)
    assert "zero_stage" not in alone
    assert "it takes more GPUs" in out_of_memory.advise(config, dimensions, 1, 10**6)


def test_recordings_of_several_grids_are_offered_to_be_left_out(
    digits: Path, riae_run: Path, tmp_path: Path
) -> None:
    config = without_cache(r2id_config(digits, riae_run, tmp_path / "run"))
    dimensions = find_dimensions(config)
    several = replace(dimensions, shapes=3)
    limit = 80 * 10**9
    assert dimensions.shapes == 1
    assert "train.compile" not in out_of_memory.advise(config, dimensions, 1, limit)
    assert "train.compile=true (" in out_of_memory.advise(config, several, 1, limit)


def test_what_has_no_deterministic_way_is_said_with_the_setting(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("pool_backward does not have a deterministic implementation\nmore")

    monkeypatch.setattr(WindowLoss, "forward", refuse)
    wanted = riae_config(digits, tmp_path / "on", "train.deterministic=true")
    with pytest.raises(WorkError, match=r"^train\.deterministic = true: .*pool_backward.*tion$"):
        train(wanted)
    with pytest.raises(RuntimeError, match="pool_backward") as raised:
        train(riae_config(digits, tmp_path / "off"))
    assert not isinstance(raised.value, WorkError)


def test_sampling_names_what_it_was_at(r2id_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler.load(r2id_run)
    labels, seeds = torch.tensor([1, 2, 3]), torch.arange(3)
    with (
        monkeypatch.context() as patch,
        pytest.raises(WorkError, match=r"decoding \d+ pictures of 12x9 at"),
    ):
        patch.setattr(Codec, "decode", run_out)
        sampler.sample(labels, seeds, (12, 9))
    monkeypatch.setattr(type(sampler.model), "predict", run_out)
    with pytest.raises(WorkError, match=r"denoising \d+ grids of \d+x\d+ at once: .*20.00 GiB\)$"):
        sampler.sample(labels, seeds, (12, 9))
