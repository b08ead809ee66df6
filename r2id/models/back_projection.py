"""Pictures in smaller pixels whose means are the colours of the larger ones.

A picture that is drawn in more pixels than it has points should be the same picture once it is
averaged down. Interpolation alone blurs it. So what means lack is interpolated and added, a few
times, and before each time colours are clipped to what can be shown: iterative back-projection
(Irani & Peleg 1991, "Improving resolution by image registration").

Shape letters: B batch · C colours · P, Q points along one axis · N pixels along it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from r2id.constants import cached_tensors
from r2id.models.coords import Part, Size
from r2id.models.resampling import along_axes, axis_matrix

_ROUNDS = 3
_REACH = 3
"""Points on each side through which a pixel depends on others in one round."""
_MOST_SAMPLES = 4
"""Pixels of a point along each axis, whose mean is taken. Pictures in still smaller ones get the
corrections of these, so that a piece of a picture needs few pixels around it."""


class Residuals(NamedTuple):
    """For each round, the points' colours minus the means of the rendered pixels there."""

    rounds: list[Tensor]
    """[B, C, Q, Q'] each. An axis that has no smaller pixels than points has pixels here."""
    first: Size
    """Row and column of the first one."""


def sampled_size(native: Size, size: Size) -> Size:
    """The size (H, W) in whose pixels means are taken, for pictures of a size."""
    height, width = (
        min(pixels, _MOST_SAMPLES * points) for points, pixels in zip(native, size, strict=True)
    )
    return height, width


def surroundings(native: Size, size: Size, part: Part) -> Part:
    """The part of a picture of ``sampled_size`` that decides what a part of a size lacks."""
    sides = zip(native, sampled_size(native, size), size, part, strict=True)
    rows, columns = (_around(*side) for side in sides)
    return rows, columns


def _around(points: int, sampled: int, pixels: int, side: slice) -> slice:
    start, stop, _ = side.indices(pixels)
    if pixels <= points:
        return slice(start, stop)
    reach = _ROUNDS * _REACH
    first = max(0, start * points // pixels - reach)
    last = min(points, -(-stop * points // pixels) + reach)
    return slice(first * sampled // points, -(-last * sampled // points))


def find_residuals(
    drawn: Tensor, seen: Tensor, native: Size, size: Size, part: Part, first: Size
) -> Residuals:
    """Compare means of pixels with points, in each round.

    ``drawn`` [B, C, rows, columns] is a part of pictures of a size, ``seen`` [B, C, …] the colours
    of points from row and column ``first`` on, of pictures of ``native`` points. Along an axis that
    has fewer pixels than points, pixels are compared with resized points.
    """
    rows, columns = (
        _means(points, pixels, side.indices(pixels)[:2], start, known, drawn.device)
        for points, pixels, side, start, known in zip(
            native, size, part, first, seen.shape[2:], strict=True
        )
    )
    begin = rows.first, columns.first
    wanted = along_axes(rows.wanted, seen, columns.wanted).clamp(-1, 1)
    rounds: list[Tensor] = []
    for _ in range(_ROUNDS):
        if rounds:
            drawn = back_project(drawn, Residuals(rounds[-1:], begin), native, size, part)
        drawn = drawn.clamp(-1, 1)
        rounds.append(wanted - along_axes(rows.mean, drawn, columns.mean))
    return Residuals(rounds, begin)


def back_project(
    drawn: Tensor, residuals: Residuals, native: Size, size: Size, part: Part
) -> Tensor:
    """Correct a part of pictures of a size, [B, C, rows, columns], round by round."""
    for residual in residuals.rounds:
        rows, columns = (
            axis_matrix(
                min(points, pixels), pixels, side.indices(pixels), start, known, drawn.device
            )
            for points, pixels, side, start, known in zip(
                native, size, part, residuals.first, residual.shape[2:], strict=True
            )
        )
        drawn = drawn.clamp(-1, 1) + along_axes(rows, residual, columns)
    return drawn


class _Means(NamedTuple):
    """Matrices of one axis. Where pixels are not smaller than points, Q is N."""

    wanted: Tensor
    """Colours that means should have, from those of points: [Q, P]."""
    mean: Tensor
    """Means of pixels: [Q, N]."""
    first: int
    """Number of the first point of Q."""


@cached_tensors(32)
def _means(
    points: int, pixels: int, part: tuple[int, int], first: int, known: int, device: torch.device
) -> _Means:
    (start, stop), count = part, min(points, pixels)
    # Points all of whose pixels are in the part.
    whole = -(-start * count // pixels), stop * count // pixels
    places = np.arange(*whole)[:, None]
    # How much of each point's place a pixel covers.
    edges = np.arange(start, stop + 1) * (count / pixels)
    covered = np.minimum(edges[1:], places + 1) - np.maximum(edges[:-1], places)
    mean = torch.from_numpy(covered.clip(0)).float().to(device, non_blocking=True)
    return _Means(axis_matrix(points, count, (*whole, 1), first, known, device), mean, whole[0])
