"""Checkpoints and exported models: safetensors and JSON, so that reading them runs no code.

A checkpoint is a folder that is either complete or absent. Any engine, with any number of ranks,
can resume from it::

    RUN/checkpoints/step-00001000/checkpoint.json        what it is, and a hash of every file
                                 /model.safetensors      weights          float32, by parameter name
                                 /ema.safetensors        their average    (others: ema-SIGMA)
                                 /optimizer.safetensors  exp_avg.NAME, exp_avg_sq.NAME
                                 /discriminator.safetensors  the loss's own network, if it has one
                                 /stats.safetensors      RIAE only: mean and std of its latents
                                 /codec.safetensors      R2ID only: its RIAE, as an exported model
    RUN/checkpoints/latest                               name of the newest, for other programs
    RUN/ema/step-00000500/                               averages only, to make other widths from

In a job of several ranks each rank writes the elements that it holds into a file of its own,
KIND-00001-of-00002.safetensors.

* ``files``: the format of a checkpoint's folder
* ``reading``: opens checkpoints
* ``writing``: saves checkpoints
* ``state``: the state that engines hand over and take back
* ``averages``: the mathematics of averages of any width
* ``export`` and ``pretrained``: write and read a trained model as one file
* ``hub``: fetches published models from the Hugging Face Hub
* ``trained``: opens any of them, for inference
"""

from r2id.checkpoints.reading import Checkpoint

__all__ = ["Checkpoint"]
