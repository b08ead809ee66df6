"""Pictures while training: what is in them, and a film that goes on after a stop."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from r2id.config import R2idRun, load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import InputError
from r2id.images import psnr, resize, tile, to_bytes
from r2id.models.codec import Codec
from r2id.sampling import Sampler
from r2id.training.loop import train
from r2id.training.sheet import Row, save_sheet
from r2id.training.tracking import NullTracker, Tracker
from tests.conftest import CONFIGS, TINY_R2ID
from tests.evaluation.folders import write_folder
from tests.training import loop_ranks
from tests.training.configs import riae_config
from tests.training.loop_ranks import STEPS

SCALE = 6  # of 8x8 pixels to 48x48


def row_of(images: torch.Tensor) -> np.ndarray:
    """Grey images side by side, as they look on a sheet."""
    pixels = to_bytes(tile(images, len(images))).repeat_interleave(SCALE, 0)
    return pixels.repeat_interleave(SCALE, 1).expand(-1, -1, 3).numpy()


def places(file: Path, picture: np.ndarray, shades: int = 3) -> list[int]:
    """The heights at which a sheet shows a picture, at most a few shades away."""
    sheet = np.asarray(Image.open(file)).astype(int)
    height, width, _ = picture.shape
    return [
        top
        for top in range(len(sheet) - height + 1)
        if np.abs(sheet[top : top + height, 6 : 6 + width] - picture).max(initial=0) <= shades
    ]


def test_reconstructions_are_under_their_originals_at_three_sizes(
    digits: Path, tmp_path: Path
) -> None:
    config = riae_config(digits, tmp_path / "run", "train.steps=6", "train.preview_every=6")
    train(config)
    codec = Codec.load(tmp_path / "run")
    batches = eval_loader(
        ShardSet.open(digits), config.data, split=config.data.test_split, batch=10, limit=10
    )
    images = next(iter(batches))["image"]
    found = []
    for side in (8, 4, 16):
        found += [
            places(tmp_path / "run" / "samples" / "step-00000006.png", row_of(pictures))
            for pictures in (
                resize(images, (side, side)),
                codec.decode(codec.encode(images), (side, side)),
            )
        ]
    assert all(found)
    # At half size both may look the same: then each is found at both places.
    tops = [min(found[row]) if row % 2 == 0 else max(found[row]) for row in range(6)]
    assert tops == sorted(set(tops))


def test_quality_is_told_before_training_and_after_it(
    digits: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss is no measure of it: it counts magnified and resized images, too."""
    recorded: list[tuple[dict[str, float], int]] = []

    class Recorder(NullTracker):
        def metrics(self, values: Mapping[str, float], step: int) -> None:
            recorded.append((dict(values), step))

    monkeypatch.setattr(Tracker, "start", lambda *given, **named: Recorder())
    run = riae_config(digits, tmp_path / "run", "train.steps=4", "train.preview_every=2")
    train(run)
    quality = {
        step: values["reconstruction/psnr"]
        for values, step in recorded
        if "reconstruction/psnr" in values
    }
    assert list(quality) == [0, 2, 4]
    before, after = (line for line in capsys.readouterr().err.splitlines() if "PSNR" in line)
    assert before == f"PSNR of 10 plain reconstructions before the first step: {quality[0]:.2f} dB"
    assert after == f"PSNR of 10 plain reconstructions at the end: {quality[4]:.2f} dB"
    codec = Codec.load(tmp_path / "run")
    batches = eval_loader(
        ShardSet.open(digits), run.data, split=run.data.test_split, batch=10, limit=10
    )
    images = next(iter(batches))["image"]
    error = (codec.decode(codec.encode(images), (8, 8)) - images).square().mean()
    assert quality[4] == pytest.approx(float(psnr(error)), abs=0.01)


def test_a_resumed_run_tells_no_quality_of_its_start(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(riae_config(digits, tmp_path / "run", "train.steps=2"))
    capsys.readouterr()
    train(riae_config(digits, tmp_path / "run", "train.steps=4"))
    assert "before the first step" not in capsys.readouterr().err


def test_without_a_test_image_they_show_training_images(tmp_path: Path) -> None:
    (tmp_path / "source" / "test").mkdir(parents=True)
    (tmp_path / "source" / "test" / "broken.png").write_bytes(b"no image")
    shards = write_folder(tmp_path, {"train": 20})
    assert ShardSet.open(shards).manifest.splits["test"].samples == 0
    train(riae_config(shards, tmp_path / "run", "train.steps=2", "train.preview_every=2"))
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()


def r2id_config(digits: Path, riae_run: Path, latents: Path, run: Path, steps: int) -> R2idRun:
    settings = [
        *TINY_R2ID,
        f"run={run}",
        f"data.shards={digits}",
        f"codec={riae_run}",
        f"data.latents={latents}",
        f"train.steps={steps}",
        "train.preview_every=10",
        "train.save_every=10",
    ]
    config = load_config(CONFIGS / "digits" / "r2id.toml", settings)
    assert isinstance(config, R2idRun)
    return config


def test_previews_of_a_class_that_is_not_there_are_refused_at_once(
    digits: Path, riae_run: Path, latents: Path, tmp_path: Path
) -> None:
    config = r2id_config(digits, riae_run, latents, tmp_path / "run", 20)
    sample = config.sample.model_copy(update={"labels": (3, "cat")})
    with pytest.raises(InputError, match="label cat: must be 0 to 9"):
        train(config.model_copy(update={"sample": sample}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_film_has_a_row_for_each_preview(
    digits: Path, riae_run: Path, latents: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(r2id_config(digits, riae_run, latents, run, 20))
    rows = {}
    for step in (10, 20):
        name = f"step-{step:08d}.png"
        pixels = torch.from_numpy(
            np.array(Image.open(run / "samples" / "film" / name).convert("RGB"))
        )
        rows[step] = pixels.repeat_interleave(SCALE, 0).repeat_interleave(SCALE, 1).numpy()
        assert len(places(run / "samples" / name, rows[step], 0)) == 1
    film = run / "samples" / "film.png"
    assert (rows[10] != rows[20]).any()
    first, last = places(film, rows[10], 0), places(film, rows[20], 0)
    assert len(first) == len(last) == 1 and first < last
    sampler = Sampler.load(run)
    labels = torch.arange(10)
    drawn = row_of(sampler.sample(labels, labels, (8, 8)))
    assert places(film, drawn) == last, "the newest row is drawn by the newest averages"

    # What a process that was killed has drawn of steps that are made again.
    (run / "samples" / "film" / "step-00000099.png").write_bytes(
        (run / "samples" / "film" / "step-00000010.png").read_bytes()
    )
    train(r2id_config(digits, riae_run, latents, run, 30))
    assert places(film, rows[10], 0) == first and places(film, rows[20], 0) == last
    row = last[0] - first[0]
    with Image.open(film) as picture:
        assert last[0] + row < picture.height < last[0] + 2 * row, "one more row, not two"


def test_a_long_film_shows_some_rows_the_first_and_the_last() -> None:
    from r2id.training.callbacks.previews import _spread

    assert _spread(range(10, 60, 10), 5) == [10, 20, 30, 40, 50]
    chosen = _spread(range(1000), 24)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, 999, 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_caption_is_drawn_above_its_row_and_whole(channels: int, tmp_path: Path) -> None:
    picture = torch.full((channels, 4, 4), -1.0)
    rows = [Row("a caption that is wider than the picture", picture, 3)]
    sheet = np.asarray(Image.open(save_sheet("title", rows, tmp_path / "sheet.png")).convert("L"))
    empty = [Row("", picture, 3)]
    blank = np.asarray(Image.open(save_sheet("title", empty, tmp_path / "0.png")).convert("L"))
    assert sheet.shape[0] == blank.shape[0] and sheet.shape[1] > 200
    (dark,) = np.nonzero((sheet < 255).any(1))
    assert (sheet[:, -6:] == 255).all(), "no letter is cut off"
    assert len(dark) > 3 * 4


def test_a_signal_in_the_last_step_leaves_the_last_picture(digits: Path, tmp_path: Path) -> None:
    """The run is finished then: there is nothing to go on with, and no other moment to draw it."""
    assert loop_ranks.stopped(loop_ranks.config(digits, tmp_path), STEPS, 0) == "not stopped"
    assert (tmp_path / "samples" / f"step-{STEPS:08d}.png").is_file()
