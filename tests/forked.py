"""The context of the tests' child processes.

They are forked from a server that has imported everything once, so that one is there at once, and
ends as a real process ends. Python has one such server for all contexts, and whoever sets its
imports last wins: hence one list.
"""

import multiprocessing

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "data_prep.prepare",
        "data_prep.mnist",
        "data_prep.folder",
        "webdataset.writer",
        "tests.data_prep.conftest",
        "tests.training.adversarial_ranks",
        "tests.training.children",
        "tests.training.engine_ranks",
        "tests.training.loop_ranks",
    ]
)
