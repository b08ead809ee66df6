"""Training: from a config to checkpoints.

From the command to a step it is four calls::

    r2id train CONFIG → loop.train(config) → loop.run(state, callbacks) → step.step_or_skip(state)

* ``loop.py``: the loop
* ``state.py``: the state that the loop changes and its callbacks read
* ``callbacks/``: all that a run does beside training: logs, checkpoints, pictures, signals
* ``sheet.py``: how pictures of a run are laid out, with captions
* ``tasks.py``: what is trained (RIAE or R2ID), on which data
* ``losses/``: what is minimised
* ``engines/``: forward, backward and update, in one process or many
* ``resume.py``: where a run begins
* ``tracking/``: MLflow
* ``encode.py``: the cache of a dataset's latents, for ``r2id encode``
* ``workload.py``, ``memory_estimate.py``, ``planner.py``: what a run will need, for ``r2id plan``
"""
