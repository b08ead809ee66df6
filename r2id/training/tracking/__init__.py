"""Experiment tracking: the only package that imports mlflow. Only rank 0 has a Tracker.

* ``tracker.py``: records a training run without ever stopping or slowing it
* ``store.py``: opens runs in MLflow
* ``pipeline.py``: opens and closes the run of a pipeline, whose stages are its child runs
* ``newest.py``: says where the newest run is
* ``facts.py``: a run's parameters and tags
"""

from r2id.training.tracking.tracker import PARENT_VARIABLE, NullTracker, Status, Tracker

__all__ = ["PARENT_VARIABLE", "NullTracker", "Status", "Tracker"]
