"""Experiment tracking: the only package that imports mlflow, and only rank 0 has a Tracker.

``tracker.py`` records from a training run without ever stopping or slowing it · ``store.py`` opens
runs in MLflow · ``pipeline.py`` opens and closes the run that a pipeline's stages are children of ·
``facts.py`` makes a run's parameters and tags.
"""

from r2id.training.tracking.tracker import PARENT_VARIABLE, NullTracker, Status, Tracker

__all__ = ["PARENT_VARIABLE", "NullTracker", "Status", "Tracker"]
