"""The configs of real datasets fit their GPUs, belong together, and start."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.prepare import prepare
from pipelines.pipeline import PipelineExecution
from r2id.checkpoints import Checkpoint
from r2id.config import PipelineRun, PrepareConfig, R2idRun, RiaeRun, load_config
from r2id.config.batch_split import accumulation, micro_batch_size
from r2id.training.ema import decays
from r2id.training.encode import encode
from r2id.training.loop import train
from r2id.training.planner import RUNTIME, memory
from r2id.training.recording import MOST
from r2id.training.workload import Dimensions, Workload, parameter_count
from tests.conftest import CONFIGS

STAGES = sorted(
    path for folder in ("celeba", "imagenet") for path in (CONFIGS / folder).glob("r*.toml")
)
R2ID_STAGES = [path for path in STAGES if path.stem.startswith("r2id")]
PIPELINES = sorted(CONFIGS.rglob("*pipeline*.toml"))

GIGABYTES = {"celeba": 16, "imagenet": 80}  # of one GPU
CLASSES = {"celeba": 2, "imagenet": 1000}
LARGEST = {
    "celeba/riae": (218, 178),
    "imagenet/riae-256": (256, 256),
    "imagenet/riae-512": (512, 512),
}
DIT = {
    "b": 130e6,
    "l": 458e6,
    "xl": 675e6,
}  # parameters of DiT-B, L and XL (Peebles & Xie 2023, table 1 and appendix)

TINY = [
    "train.steps=3",
    "train.batch=8",
    "train.micro_batch=4",
    "data.workers=1",
    "tracking.enabled=false",
]
NARROW = {
    "lattice": [
        "riae.width=32",
        "riae.encoder_blocks=1",
        "riae.decoder_blocks=1",
        "riae.features=4",
    ],
    "attention": [
        "riae.width=32",
        "riae.pixel_width=16",
        "riae.heads=2",
        "riae.encoder_blocks=1",
        "riae.decoder_blocks=1",
    ],
    "r2id": [
        "r2id.width=32",
        "r2id.heads=2",
        "r2id.encoder_blocks=1",
        "r2id.decoder_blocks=1",
        "sample.steps=2",
        "sample.labels=[0, 1]",
    ],
}
SIZES = {"celeba": [(218, 178)], "imagenet": [(96, 128), (128, 96), (112, 112), (375, 500)]}


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def riae_of(path: Path) -> Path:
    """The config of the RIAE that a stage's images go through: of its own dataset and area."""
    return path.with_name("-".join(["riae", *path.stem.split("-")[1:][-1:]]) + ".toml")


def work_of(path: Path) -> Workload:
    config, riae = load_config(path), load_config(riae_of(path))
    assert isinstance(config, RiaeRun | R2idRun) and isinstance(riae, RiaeRun)
    largest, classes = LARGEST[name_of(riae_of(path))], CLASSES[path.parent.name]
    shapes = 1 if len(SIZES[path.parent.name]) == 1 else MOST + 1
    return Workload(config, Dimensions(largest, 1, classes, riae.riae, shapes=shapes))


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_a_step_fits_on_1_8_and_64_gpus(path):
    work, found = work_of(path), []
    for gpus in (1, 8, 64):
        train = work.config.train
        assert gpus * micro_batch_size(train, gpus) * accumulation(train, gpus) == train.batch
        found.append(memory(work, gpus)["total"] + RUNTIME)
    assert max(found) < GIGABYTES[path.parent.name] * 1e9
    assert found == sorted(found, reverse=True), "more GPUs take more memory each"


@pytest.mark.parametrize(
    "path", [path for path in R2ID_STAGES if path.parent.name == "imagenet"], ids=name_of
)
def test_r2id_is_as_large_as_dit(path):
    with torch.device("meta"):
        found = parameter_count(work_of(path).module())
    assert found == pytest.approx(DIT[path.stem.split("-")[1]], rel=0.2)


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_the_parameters_that_are_told_are_the_models(path):
    with torch.device("meta"):
        millions = str(round(parameter_count(work_of(path).module().model) / 1e6))
    rows = (CONFIGS / "README.md").read_text(encoding="utf-8")
    told = re.findall(rf"\| `{name_of(path)}` \| (\d+) M \|", rows)
    assert len(told) == 1, "the table of what is planned on GPUs has a row for each"
    told += re.findall(r"(?<!the )\b(\d+) M parameters", path.read_text(encoding="utf-8"))
    assert set(told) == {millions}


@pytest.mark.parametrize("path", R2ID_STAGES, ids=name_of)
def test_the_guide_of_sampling_is_one_of_the_averages_that_a_plan_counts(path):
    config = load_config(path)
    assert isinstance(config, R2idRun) and config.sample.autoguidance
    assert list(decays(config.train)) == ["ema", "ema-0.1", "guide"]


@pytest.mark.parametrize("path", R2ID_STAGES, ids=name_of)
def test_r2id_takes_the_images_and_latents_that_its_riae_left(path):
    r2id, riae = load_config(path), load_config(riae_of(path))
    pipeline = load_config(path.with_name(riae_of(path).name.replace("riae", "pipeline")))
    assert (
        isinstance(r2id, R2idRun)
        and isinstance(riae, RiaeRun)
        and isinstance(pipeline, PipelineRun)
    )
    for name in ("shards", "channels", "size", "max_pixels", "test_split"):
        assert getattr(r2id.data, name) == getattr(riae.data, name)
    assert r2id.data.shards == pipeline.prepare.out
    assert (
        r2id.codec == riae.run == pipeline.out / "riae"
        and r2id.data.latents == pipeline.out / "latents"
    )


@pytest.mark.parametrize("path", PIPELINES, ids=name_of)
def test_a_pipeline_finds_its_stages(path):
    config = load_config(path)
    assert isinstance(config, PipelineRun)
    pipeline = PipelineExecution(config, path.parent)
    assert {stage.run.stage for stage in pipeline.riae_stages.values()} == {"riae"}
    r2id = pipeline.r2id_stage.run
    assert r2id.stage == "r2id"
    # Stages that are trained one by one, without the pipeline, find each other too.
    for name, stage in config.training_stages().items():
        alone = load_config(path.parent / stage.config)
        if name == "r2id":
            assert alone.codec == r2id.codec
        else:
            given = pipeline.riae_stages[name].run
            assert (alone.run, alone.init_from) == (given.run, given.init_from)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Shards of parts of photos, of two classes, for each dataset in its sizes."""
    from sklearn.datasets import load_sample_images

    found = {}
    for dataset, sizes in SIZES.items():
        folder = tmp_path_factory.mktemp(dataset)
        draw = np.random.default_rng(0)
        for number in range(48):
            label = number % 2
            split, size = (
                ("train", "val", "test")[max(0, number // 8 - 3)],
                sizes[number // 2 % len(sizes)],
            )
            photo = load_sample_images().images[label]
            top, left = (int(draw.integers(photo.shape[axis] - size[axis] + 1)) for axis in (0, 1))
            file = folder / "in" / split / "ab"[label] / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[top : top + size[0], left : left + size[1]]).save(file)
        found[dataset] = prepare(
            PrepareConfig(dataset="folder", source=folder / "in", out=folder / "shards")
        )
    return found


@pytest.fixture(scope="module")
def codecs(photos, tmp_path_factory):
    """Path of an RIAE config → its run after three steps, narrow, and the cache of its latents."""
    known: dict[Path, tuple[Path, Path]] = {}

    def codec(path: Path) -> tuple[Path, Path]:
        if path not in known:
            folder, shards = tmp_path_factory.mktemp(path.stem), photos[path.parent.name]
            config = load_config(path)
            assert isinstance(config, RiaeRun)
            narrow = NARROW[config.riae.kind]
            config = load_config(
                path, [*TINY, *narrow, f"run={folder}/riae", f"data.shards={shards}"]
            )
            assert train(config)["step"] == 3
            encode(folder / "riae", shards, folder / "latents")
            known[path] = folder / "riae", folder / "latents"
        return known[path]

    return codec


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.parent.name == "celeba" else pytest.mark.slow)
        for path in STAGES
    ],
    ids=name_of,
)
def test_it_starts(path, photos, codecs, tmp_path):
    """Three steps of the config, narrower, on few photos; R2ID's latents are by that RIAE."""
    run, latents = codecs(riae_of(path))
    if path in R2ID_STAGES:
        shards, codec, run = photos[path.parent.name], run, tmp_path / "run"
        config = load_config(
            path,
            [
                *TINY,
                *NARROW["r2id"],
                f"run={run}",
                f"codec={codec}",
                f"data.shards={shards}",
                f"data.latents={latents}",
            ],
        )
        result = train(config)
        assert result["step"] == 3 and math.isfinite(result["loss"])
    meta = Checkpoint.open(run).meta
    assert meta.step == 3 and meta.samples == 24
    for kind in ("ema", "ema-0.1"):
        assert all(
            tensor.isfinite().all() for tensor in Checkpoint.open(run).tensors(kind).values()
        )
    with Image.open(run / "samples" / "step-00000003.png") as picture:
        assert picture.mode == "RGB"
