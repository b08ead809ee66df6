"""Constants that are kept: shared, bounded, and never those of a mode without contents."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from r2id.constants import cached_tensors, constant
from r2id.models import coords
from r2id.models.resampling import resample
from r2id.models.tiles import tiles_of


def test_results_are_made_once_and_a_number_of_them_is_kept() -> None:
    calls = []

    @cached_tensors(2)
    def make(size: int) -> torch.Tensor:
        calls.append(size)
        return torch.zeros(size)

    assert make(1) is make(1) and calls == [1]
    make(2), make(3), make(1)
    assert calls == [1, 2, 3, 1]


def test_tensors_without_contents_are_neither_kept_nor_given_kept_ones() -> None:
    """Memory is counted on fake tensors, in the same process as training and sampling."""

    def all_kinds() -> list[torch.Tensor]:
        tiles = tiles_of((9, 7), 4, 1)
        small = resample(torch.zeros(1, 1, 9, 7), (5, 3), (slice(0, 2), slice(0, 3)))
        return [
            constant((9.0, 7.5)),
            coords.grid_coordinates((9, 7)),
            coords.relative_scale((9, 7)),
            tiles.keys,
            tiles.takers.index,
            small,
        ]

    for _ in range(2):
        with FakeTensorMode():
            assert all(isinstance(tensor, FakeTensor) for tensor in all_kinds())
        real = all_kinds()
        assert not any(isinstance(tensor, FakeTensor) for tensor in real)
        assert real[0].tolist() == [9.0, 7.5]


def test_what_sampling_made_serves_training() -> None:
    weight = torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        constant((3.0, 0.25))
    (weight * constant((3.0, 0.25))).sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 0.25]
