"""``python -m r2id.training.tracking.newest`` prints the address of the newest run's page.

It takes the options of ``mlflow server`` and understands those that make its address.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from r2id.mlflow_pages import run_page
from r2id.progress import say
from r2id.training.tracking.store import connect, first_line


def newest_page(server: str) -> str | None:
    """Return the address of the newest run's page on a server; None when there is no run.

    Stages of a pipeline do not count, because the pipeline's page shows them.
    """
    client = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, order_by=["attributes.start_time DESC"])
    for run in runs:
        if "mlflow.parentRunId" not in run.data.tags:
            return run_page(run.info.experiment_id, run.info.run_id, server=server)
    return None


def main(arguments: Sequence[str]) -> int:
    """Say where the newest run is, on the server that these options start; return 0."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", "-h", default="127.0.0.1")
    parser.add_argument("--port", "-p", default="5000")
    options = parser.parse_known_args(arguments)[0]
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    try:
        page = newest_page(f"http://{host}:{options.port}/")
        say(f"the newest run, in a few seconds: {page}" if page else "no run is recorded here yet")
    except Exception as error:  # the server may start all the same, and says more
        say(f"MLflow: {first_line(error)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
