"""Prefect's files in a temporary folder; set before anything imports Prefect, which reads it then."""

import os
import tempfile

os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="r2id-prefect-"))
