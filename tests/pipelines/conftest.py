"""Prefect's files go to a temporary folder, named before anything imports Prefect."""

import os
import tempfile

os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="r2id-prefect-"))
