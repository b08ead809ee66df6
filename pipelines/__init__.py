"""Prefect flows: one for each stage and one for all. Stages are processes and exchange files.

Start at pipeline.py (run_pipeline); flows.py has the stages, subprocesses.py their processes,
preparation.py the sharding of datasets, record.py what a pipeline remembers, mlflow_run.py its run
in MLflow, artifacts.py what Prefect shows and orchestration.py its server.
"""

import os as _os

import r2id as _r2id  # noqa: F401 (it switches off reports of usage)

# Prefect reads these when it is imported, so they are set before any module of this package can
# import it. Its console log repeats what the stages print and answers a misspelt option with pages
# of traceback; the log in its own database is complete. A variable that is already set is kept.
_os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
_os.environ.setdefault("PREFECT_LOGGING_HANDLERS_DEBUG_LEVEL", "CRITICAL")
_os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
