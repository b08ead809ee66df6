"""Small real data and models that many tests share, built once for all test processes."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# The models are so small that more threads would only wait for each other; set before torch reads
# it, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from filelock import FileLock

from r2id import cli
from r2id.config import load_config

if TYPE_CHECKING:
    from PIL import Image

    from r2id import Pipeline
    from r2id.sampling.sampler import Sampler

torch.set_num_threads(1)

# Tests in the background of a script or under nohup are begun with these ignored. The processes
# that they start and stop would ignore them, too.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

CONFIGS = Path(__file__).parent.parent / "configs"
ATTENTION_CONFIG = Path(__file__).parent / "attention-riae.toml"

TINY_RIAE = [
    "riae.lapped=true",
    "riae.width=32",
    "riae.features=4",
    "riae.encoder_blocks=1",
    "riae.decoder_blocks=1",
    "train.steps=60",
    "train.batch=32",
    "optim.warmup=10",
    "train.log_every=20",
    "tracking.enabled=false",
]
"""For configs/digits/riae.toml."""
TINY_ATTENTION = [
    *(setting for setting in TINY_RIAE if setting not in ("riae.features=4", "riae.lapped=true")),
    "riae.pixel_width=32",
    "riae.heads=2",
]
"""For ATTENTION_CONFIG, an RIAE by attention."""
TINY_R2ID = [
    "r2id.width=32",
    "r2id.heads=2",
    "r2id.encoder_blocks=1",
    "r2id.decoder_blocks=1",
    "train.steps=40",
    "train.batch=32",
    "optim.warmup=10",
    "train.log_every=20",
    "sample.steps=4",
    "tracking.enabled=false",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: no process is left with a long file at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


Build = Callable[[Path], None]


@pytest.fixture(scope="session")
def build_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Build], Path]:
    """Return the folder ``name`` that all test processes share; the first to ask builds it."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def built(name: str, build: Build) -> Path:
        folder, complete = root / f"shared-{name}", root / f"shared-{name}.complete"
        with FileLock(root / f"shared-{name}.lock"):
            if not complete.exists():
                shutil.rmtree(folder, ignore_errors=True)  # left by a build that failed
                folder.mkdir()
                build(folder)
                complete.touch()
        return folder

    return built


@pytest.fixture(scope="session")
def digits(build_once) -> Path:
    """Shards of the digits."""
    from data_prep.prepare import prepare
    from r2id.config import PrepareConfig

    def build(folder: Path) -> None:
        prepare(PrepareConfig(dataset="digits", out=folder / "shards"))

    return build_once("digits", build) / "shards"


@pytest.fixture(scope="session")
def classifier_file(digits, build_once) -> Path:
    """A classifier of the digits, as an evaluation leaves it in its folder.

    It has seen a quarter of the images that it would see there, since all that use it wait for it.
    """
    from r2id.config import DataConfig
    from r2id.data.shards import ShardSet
    from r2id.evaluation import classifier

    def build(folder: Path) -> None:
        file = folder / "classifier.safetensors"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(classifier, "MOST_IMAGES", classifier.FEWEST_IMAGES // 4)
            classifier.load_or_train_classifier(
                ShardSet.open(digits), DataConfig(shards=digits), file, torch.device("cpu")
            )

    return build_once("classifier", build) / "classifier.safetensors"


@pytest.fixture(scope="session")
def riae_run(digits, build_once) -> Path:
    """Run directory of a small RIAE, trained for 60 steps."""
    from r2id.training.loop import train

    def build(folder: Path) -> None:
        overrides = [*TINY_RIAE, f"run={folder}/run", f"data.shards={digits}"]
        train(load_config(CONFIGS / "digits" / "riae.toml", overrides))

    return build_once("riae", build) / "run"


@pytest.fixture(scope="session")
def latents(digits, riae_run, build_once) -> Path:
    """Latent cache of the digits by that RIAE."""
    from r2id.training.encode import encode

    def build(folder: Path) -> None:
        encode(riae_run, digits, folder / "cache")

    return build_once("latents", build) / "cache"


@pytest.fixture(scope="session")
def r2id_run(digits, riae_run, latents, build_once) -> Path:
    """Run directory of a small R2ID, trained for 40 steps."""
    from r2id.training.loop import train

    def build(folder: Path) -> None:
        overrides = [
            *TINY_R2ID,
            f"run={folder}/run",
            f"data.shards={digits}",
            f"codec={riae_run}",
            f"data.latents={latents}",
        ]
        train(load_config(CONFIGS / "digits" / "r2id.toml", overrides))

    return build_once("r2id", build) / "run"


@pytest.fixture(scope="session")
def sampler(r2id_run: Path) -> Sampler:
    """The sampler of that R2ID."""
    from r2id.sampling.sampler import Sampler

    return Sampler.load(r2id_run)


@pytest.fixture(scope="session")
def pipe(r2id_run: Path) -> Pipeline:
    """The pipeline of that R2ID."""
    from r2id import Pipeline

    return Pipeline.from_pretrained(r2id_run, device="cpu")


@pytest.fixture(scope="session")
def picture(pipe: Pipeline) -> Image.Image:
    """A digit that it has drawn."""
    return pipe(3, size=(8, 8), seeds=4)[0]


@pytest.fixture
def r2id(monkeypatch, capfd):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["r2id", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code = int(exit.code or 0)
        out, errors = capfd.readouterr()
        return code, out, errors

    return run
