"""Training: from a config to checkpoints.

From the command to a step it is four calls::

    r2id train CONFIG → loop.train(config) → loop.run(state, callbacks) → loop.step(state)

``loop.py`` is the loop · ``state.py`` what it changes and its callbacks read · ``callbacks/`` all
that a run does beside training: logs, checkpoints, pictures, signals · ``tasks.py`` what is trained
· ``losses/`` what is minimised · ``engines/`` forward, backward and update, in one process or many
· ``resume.py`` where a run begins · ``tracking/`` MLflow · ``workload.py``, ``planner.py`` and
``memory_estimate.py`` what a run will need, for ``r2id plan``.
"""
