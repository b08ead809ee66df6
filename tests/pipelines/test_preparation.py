"""Preparation through Prefect: on real clusters, what it shows, and with its server killed."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from pipelines.preparation import prepare_on_cluster
from r2id.config import PrepareConfig
from r2id.errors import InputError
from tests.data_prep.conftest import files_of, write_mnist
from tests.waiting import free_port, wait_until

SMALL = {"shard_mb": 0.1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "mnist"
    write_mnist(folder, train=500, test=50)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file of the set that one process writes."""
    out = tmp_path_factory.mktemp("whole") / "set"
    prepare(PrepareConfig(dataset="mnist", source=source, out=out, **SMALL))
    return files_of(out)


def answers(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def dask() -> Iterator[str]:
    """A scheduler and two worker processes."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    commands = [
        ["dask_scheduler", "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"],
        *([["dask_worker", f"tcp://{address}", "--nthreads", "1", "--no-dashboard"]] * 2),
    ]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", f"distributed.cli.{name}", *options],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for name, *options in commands
    ]
    wait_until(lambda: answers(port), alive=processes[0])
    yield f"tcp://{address}"
    for process in processes[::-1]:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def ray() -> Iterator[str]:
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(Path(sys.executable).parent / "ray")]
    port = free_port()
    subprocess.run(
        [
            *command,
            "start",
            "--head",
            "--port",
            str(port),
            "--num-cpus",
            "2",
            "--object-store-memory",
            "80000000",
            "--include-dashboard",
            "false",
            "--disable-usage-stats",
        ],
        env=environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    yield f"127.0.0.1:{port}"
    subprocess.run([*command, "stop", "--force"], check=True, capture_output=True, timeout=120)


def by_command(source: Path, out: Path, *options: str) -> None:
    """In a process of its own, as it would be."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "r2id.cli",
            "prepare",
            "mnist",
            "--source",
            str(source),
            "--out",
            str(out),
            "--shard-mb",
            str(SMALL["shard_mb"]),
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_a_cluster_writes_the_same_bytes(
    engine: str,
    source: Path,
    whole: dict[str, bytes],
    server: None,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    by_command(
        source, tmp_path / "set", "--engine", engine, "--address", request.getfixturevalue(engine)
    )
    assert (
        files_of(tmp_path / "set") == whole
        and len([name for name in whole if name.endswith(".tar")]) > 8
    )


@pytest.mark.slow
def test_a_cluster_of_its_own(
    source: Path, whole: dict[str, bytes], server: None, tmp_path: Path
) -> None:
    by_command(source, tmp_path / "set", "--engine", "dask", "--workers", "2")
    assert files_of(tmp_path / "set") == whole


def test_a_cluster_that_is_not_there(source: Path, tmp_path: Path) -> None:
    for engine, address in (
        ("dask", f"tcp://127.0.0.1:{free_port()}"),
        ("ray", f"ray://127.0.0.1:{free_port()}"),
        ("dask", "nonsense"),
    ):
        with pytest.raises(InputError, match=f"{address}.* {engine} "):
            prepare_on_cluster(
                PrepareConfig(
                    dataset="mnist",
                    source=source,
                    out=tmp_path / "set",
                    engine=engine,
                    address=address,
                )
            )
    with pytest.raises(ValueError, match=r"tcp://127\.0\.0\.1:1"):
        PrepareConfig(
            dataset="mnist", source=source, out=tmp_path / "set", address="tcp://127.0.0.1:1"
        )
    assert not (tmp_path / "set").exists()


RUN = """
import sys
from pathlib import Path
from pipelines.preparation import prepare_on_cluster
from r2id.config import PrepareConfig
if __name__ == "__main__":
    source, out, workers, shard_mb = sys.argv[1:]
    prepare_on_cluster(PrepareConfig(dataset="mnist", source=Path(source), out=Path(out),
                                     workers=int(workers), shard_mb=float(shard_mb)))
"""


class Running:
    """The prepare flow in a process of its own, with a server of its own or at an address."""

    def __init__(
        self,
        folder: Path,
        source: Path,
        out: Path,
        workers: int = 1,
        shard_mb: float = 0.06,
        server: str | None = None,
    ) -> None:
        script = folder / "run.py"
        script.write_text(RUN)
        environment = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
        if server:
            environment |= {"PREFECT_API_URL": server, "PREFECT_CLIENT_MAX_RETRIES": "1"}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(source), str(out), str(workers), str(shard_mb)],
            stderr=subprocess.PIPE,
            env=environment | {"PYTHONPATH": str(root)},
            text=True,
            start_new_session=True,
        )
        self.out = out

    def wait_for(self, shards: int) -> None:
        wait_until(
            lambda: len(list(self.out.rglob("*.parquet"))) >= shards + 1,  # and the plan's
            alive=self.process,
            every=0.01,
        )

    def finish(self) -> tuple[int, str]:
        _, errors = self.process.communicate(timeout=240)
        return self.process.returncode, errors

    def server(self) -> int:
        """The process of its Prefect server."""
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(status.read_text().rsplit(")", 1)[1].split()[1])
                if (
                    parent == self.process.pid
                    and b"prefect\0server" in status.with_name("cmdline").read_bytes()
                ):
                    return int(status.parent.name)
            except (FileNotFoundError, ProcessLookupError):
                continue
        raise AssertionError("no server")


def test_what_prefect_shows(source: Path, server: None, tmp_path: Path) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    out = tmp_path / "set"

    def prepare_it() -> None:
        # In another process, since one that has run a flow spoils the processes it forks later.
        code, said = Running(
            tmp_path, source, out, shard_mb=SMALL["shard_mb"], server=PREFECT_API_URL.value()
        ).finish()
        assert code == 0, said[-3000:]

    prepare_it()
    with get_client(sync_client=True) as client:

        def shown() -> dict[str, object]:
            found = [
                artifact
                for artifact in client.read_artifacts()
                if str(out) in str(artifact.description)
            ]
            return {str(artifact.key): artifact for artifact in found}

        artifacts = shown()
        assert set(artifacts) == {
            "prepare-progress",
            "prepare-shards",
            "prepare-samples",
            "prepare-sizes",
        }
        assert artifacts["prepare-progress"].data == 100
        assert '"shard": "train/shard-000001.tar"' in str(artifacts["prepare-shards"].data)
        for name in ("samples", "sizes"):
            assert str(artifacts[f"prepare-{name}"].data).startswith(
                f"![{name}](data:image/jpeg;base64,/9j/"
            )
        prepare_it()
        assert {key: artifact.id for key, artifact in shown().items()} == {
            key: artifact.id for key, artifact in artifacts.items()
        }, "nothing was done, nothing is shown anew"


@pytest.fixture(scope="module")
def tiny(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("tiny") / "set"
    prepare(PrepareConfig(dataset="mnist", source=source, out=out, shard_mb=0.06))
    return files_of(out)


@pytest.mark.slow
def test_its_server_is_killed(source: Path, tiny: dict[str, bytes], tmp_path: Path) -> None:
    running = Running(tmp_path, source, tmp_path / "set")
    running.wait_for(5)
    os.kill(running.server(), signal.SIGKILL)
    code, said = running.finish()
    assert code == 0, said[-3000:]
    assert "its server has ended; starting it again" in said or "going on without it" in said
    assert files_of(tmp_path / "set") == tiny


@pytest.mark.slow
def test_a_server_of_others_goes_away(source: Path, tiny: dict[str, bytes], tmp_path: Path) -> None:
    """The shards are written all the same."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port), "--no-ui"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: answers(port), alive=server)
    running = Running(tmp_path, source, tmp_path / "set", server=f"http://127.0.0.1:{port}/api")
    running.wait_for(3)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    wait_until((tmp_path / "set/manifest.json").exists, alive=running.process)
    assert files_of(tmp_path / "set") == tiny
    os.killpg(
        running.process.pid, signal.SIGKILL
    )  # Prefect's client tries for minutes to reach the server
    running.process.communicate()


@pytest.mark.slow
def test_its_process_is_killed(source: Path, tiny: dict[str, bytes], tmp_path: Path) -> None:
    running = Running(tmp_path, source, tmp_path / "set", workers=2)
    running.wait_for(3)
    os.kill(running.process.pid, signal.SIGKILL)
    running.process.wait()
    assert not (tmp_path / "set/manifest.json").exists()
    again = Running(tmp_path, source, tmp_path / "set", workers=2)
    code, said = again.finish()
    assert code == 0, said[-3000:]
    assert files_of(tmp_path / "set") == tiny


@pytest.mark.slow
def test_many_tasks_at_once_do_not_lock_the_database(source: Path, tmp_path: Path) -> None:
    running = Running(tmp_path, source, tmp_path / "set", workers=5, shard_mb=0.04)
    code, said = running.finish()
    assert code == 0 and "going on without it" not in said, said[-3000:]
    prepare(PrepareConfig(dataset="mnist", source=source, out=tmp_path / "alone", shard_mb=0.04))
    assert files_of(tmp_path / "set") == files_of(tmp_path / "alone")
    assert len(list((tmp_path / "set").rglob("*.tar"))) > 60
