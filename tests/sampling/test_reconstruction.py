"""Reconstruction of picture files: progress, and what the PSNR is of."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from r2id.config import RiaeConfig
from r2id.images import psnr, read_image, save_png
from r2id.models import cells as geometry
from r2id.models.riae import RIAE
from r2id.progress import FILE_VARIABLE
from r2id.sampling import reconstruction
from r2id.sampling.reconstruction import reconstruct_file


@pytest.mark.parametrize("kind", ["lattice", "attention"])
def test_all_pixels_are_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_PIECE", 64)
    model = RIAE(RiaeConfig(kind=kind, width=16, heads=2) if kind == "attention" else SMALL, 1)
    counts: list[int] = []
    latents = model.encode(torch.zeros(1, 1, 21, 30), advance=counts.append)
    assert sum(counts) == 21 * 30
    assert len(counts) > 1 or kind == "attention"
    counts.clear()
    model.decode(latents, (40, 33), (3, 5, 20, 33), (21, 30), counts.append)
    assert sum(counts) == 17 * 28


SMALL = RiaeConfig(width=8, encoder_blocks=0, decoder_blocks=1, features=4)


def test_progress_counts_to_its_end(
    riae_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconstruction, "_SHOWN", 0)
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "progress.json"))
    save_png(torch.rand(1, 9, 13) * 2 - 1, tmp_path / "in.png")
    for number, sizes in enumerate([[], [(18, 20)], [(9, 13), (5, 5)]]):
        reconstruct_file(riae_run, tmp_path / "in.png", tmp_path / f"out-{number}", sizes)
        state = json.loads((tmp_path / "progress.json").read_text())
        assert state["done"] == state["total"] > 0


def test_the_psnr_is_of_the_whole_picture_at_its_own_size(riae_run: Path, tmp_path: Path) -> None:
    pixels = torch.rand(1, 9, 13, generator=torch.Generator().manual_seed(0))
    save_png(pixels * 2 - 1, tmp_path / "in.png")
    image = read_image(tmp_path / "in.png", 1)
    found = [
        reconstruct_file(riae_run, tmp_path / "in.png", tmp_path / name, sizes, window=window)
        for name, sizes, window in [
            ("own", [], None),
            ("other", [(20, 20)], None),
            ("both", [(20, 20), (9, 13)], None),
            ("part", [(9, 13)], (0, 0, 4, 4)),
        ]
    ]
    assert {result["psnr"] for result in found} == {found[0]["psnr"]}
    decoded = read_image(Path(found[0]["files"][0]), 1)  # rounded to whole levels
    assert found[0]["psnr"] == pytest.approx(float(psnr(F.mse_loss(decoded, image))), abs=0.1)
