"""``python -m r2id.training.tracking.newest`` prints the address of the newest run's page.

It takes the options of ``mlflow server`` and understands those that make its address.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from r2id.mlflow_pages import run_page, server_address
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
    """Say where the newest run is, on the server that these options start, and return 0.

    If MLFLOW_TRACKING_URI is a server's address, it is on that one; return 1 if it does not answer.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", "-h", default="127.0.0.1")
    parser.add_argument("--port", "-p", default="5000")
    options = parser.parse_known_args(arguments)[0]
    host = "127.0.0.1" if options.host == "0.0.0.0" else options.host
    running = server_address()
    try:
        page = newest_page(f"{running or f'http://{host}:{options.port}'}/")
    except Exception as error:  # a server that is started may do so all the same, and says more
        say(f"MLflow: {first_line(error)}")
        return 1 if running else 0
    if running:
        say(f"MLflow's server is running already, at {running}")
    newest = "the newest run" if running else "the newest run, in a few seconds"
    say(f"{newest}: {page}" if page else "no run is recorded here yet")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
