"""Pictures on larger latent grids than training saw, which begin with one of a trained grid."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from PIL import Image

from r2id.images import resize
from r2id.models.cells import native_size
from r2id.pipeline import Pipeline
from r2id.sampling.sampler import Sampler


def test_a_trained_grid_comes_first(sampler: Sampler) -> None:
    assert sampler.areas == (16, 16)
    assert sampler.diffused_grids((8, 8)) == [(4, 4)] == sampler.diffused_grids((64, 64))
    assert sampler.diffused_grids((8, 8), (5, 3)) == [(5, 3)], "no more cells than training saw"
    assert sampler.diffused_grids((16, 16), (8, 8)) == [(4, 4), (8, 8)]
    assert sampler.diffused_grids((3, 7), (1, 40)) == [(4, 4), (1, 40)]


def test_a_picture_is_encoded_as_it_is_then_rendered(sampler: Sampler) -> None:
    """At the size that the decoder takes its grid for, so that nothing is shifted or cut."""
    codec, cell = sampler.codec, 2
    assert codec.downsample == cell
    for grid in itertools.product(range(1, 9), repeat=2):
        for like in itertools.product(range(1, 18, 3), repeat=2):
            assert codec.size_of(grid, like) == native_size(grid, like, cell)
            assert codec.grid_for(codec.size_of(grid, like)) == grid


def test_a_picture_keeps_its_layout(sampler: Sampler) -> None:
    """On twice and more cells a side it is nearer to its own picture than to the other seeds'."""
    labels, seeds = torch.arange(6), torch.arange(6)
    own = sampler.sample(labels, seeds, (16, 16)).flatten(1)
    for size, grid in (((16, 16), (8, 8)), ((8, 8), (8, 8)), ((15, 13), (8, 7))):
        drawn = resize(sampler.sample(labels, seeds, size, grid=grid), (16, 16)).flatten(1)
        apart = torch.cdist(drawn, own)
        assert apart.argmin(1).tolist() == labels.tolist()
        assert apart.diag().min() > 0.1, "and is drawn anew"


def test_its_bits_depend_on_its_seed_and_label_alone(sampler: Sampler) -> None:
    labels, seeds = torch.arange(9), torch.arange(9)
    together = sampler.sample(labels, seeds, (13, 9), grid=(7, 5))
    alone = sampler.sample(labels[8:], seeds[8:], (13, 9), grid=(7, 5))
    assert torch.equal(alone, together[8:])


def test_steps_are_counted_through_both_grids(pipe: Pipeline) -> None:
    seen = []
    pipe(
        [1] * 20,
        seeds=range(20),
        size=(16, 16),
        grid=(8, 8),
        callback=lambda step: seen.append((step.number, step.total, step.latents.shape[2:])),
    )
    batches = pipe.sampler.batches(20, (4, 4)), pipe.sampler.batches(20, (8, 8))
    assert batches[0] < batches[1]
    steps = 4
    total = steps * sum(batches)
    assert [number for number, _, _ in seen] == list(range(1, total + 1))
    assert {found for _, found, _ in seen} == {total}
    shapes = [shape for _, _, shape in seen]
    assert shapes == [(4, 4)] * steps * batches[0] + [(8, 8)] * steps * batches[1]


def test_the_command_and_python_agree(r2id, r2id_run, pipe: Pipeline, tmp_path) -> None:
    out = tmp_path / "many"
    options = ("--size", "16x16", "--grid", "8x8", "--label", 3, "--count", 1, "--format", "png")
    code, _, errors = r2id("sample", r2id_run, *options, "--out", out)
    assert code == 0, errors
    with Image.open(next((out / "images").iterdir())) as found:
        assert np.array_equal(found, pipe(3, size=(16, 16), grid=(8, 8))[0])
