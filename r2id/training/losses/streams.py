"""Streams of random numbers, one for each purpose of a loss."""

from __future__ import annotations

from enum import IntEnum


class Stream(IntEnum):
    """Keys of random numbers are folded with these.

    They must stay as they are: with others, a resumed run would not equal an uninterrupted one.
    """

    # RIAE by attention. Those up to 5, and DIRECTION, have a key for each sample.
    ENCODER_PIXELS = 0
    ENCODER_JITTER = 1
    DECODER_PIXELS = 2
    DECODER_JITTER = 3
    LATENT_NOISE = 4
    LATENT_CLOUD = 5
    DIRECTION = 13

    # R2ID.
    TIME = 6
    NOISE = 7
    DROP = 8
    JITTER = 9
    CLOUDS = 11

    # RIAE on lattices, by windows.
    STEP_KIND = 20
    SMALLER = 21
    LATENT_SCALE = 22
    WINDOW_NOISE = 23
    WINDOW = 25
