"""Checkpoints and exported models: safetensors and JSON, read without running code from them.

A checkpoint is a folder that is complete or absent. Any engine at any world size resumes from it::

    RUN/checkpoints/step-00001000/checkpoint.json        what it is, and a hash of every file
                                 /model.safetensors      weights          float32, by parameter name
                                 /ema.safetensors        their average    (more: ema-SIGMA)
                                 /optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME
                                 /stats.safetensors      RIAE only: mean and std of its latents
    RUN/checkpoints/latest                               name of the newest, for other programs
    RUN/ema/step-00000500/                               averages alone, to reconstruct others from

Ranks write one file each, KIND-00001-of-00002.safetensors, with the elements that each holds.
``reading`` opens checkpoints, ``writing`` saves them, ``files`` knows the format, ``state`` is what
training hands over, and ``export`` and ``pretrained`` write and read a trained model as one file.
"""

from r2id.checkpoints.reading import Checkpoint

__all__ = ["Checkpoint"]
