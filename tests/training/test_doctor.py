"""The launch check: what is there, what is broken and what to do, without loading what is heavy."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from r2id import dist
from r2id.errors import InputError
from r2id.training.doctor import _compiler, _runs_on, _unsupported, examine
from r2id.training.precision import bfloat16_is_fast
from r2id.training.reachable import find_server, find_store
from tests.conftest import CONFIGS

ROOT = CONFIGS.parent
VARIABLES = (
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_URL",
    "PREFECT_PROFILE",
    "CC",
    "CXX",
    "MKL_NUM_THREADS",
)


def doctor(
    folder: Path, *words: str, before: Path | None = None, cores: int = 0, **variables: str
) -> tuple[int, dict, str]:
    """Run the command in a folder: (exit code, its checks by name, what it loaded).

    ``before`` comes first where Python looks for modules; ``cores`` limits those that it may use.
    """
    allowed = sorted(os.sched_getaffinity(0))[: cores or None]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    paths = [str(path) for path in (before, ROOT) if path]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "PREFECT_HOME": str(folder / "prefect")}
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "r2id.cli", "doctor", *words, "--json"],
        cwd=folder,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, allowed),
    )
    found = json.loads(done.stdout)
    assert found["ready"] == (done.returncode == 0)
    return done.returncode, {check["name"]: check for check in found["checks"]}, done.stderr


@pytest.fixture
def answers() -> Iterator[tuple[str, dict[str, int]]]:
    """A server, and the statuses that it answers with by path; 404 for all others."""
    statuses: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", statuses
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_machine_that_can_train(tmp_path: Path) -> None:
    code, checks, loaded = doctor(tmp_path, OMP_NUM_THREADS="1", MLFLOW_TRACKING_URI="")
    assert code == 0, checks
    assert checks["packages"]["facts"]["versions"]["torch"]
    assert checks["threads"]["facts"]["threads"] == 1
    assert "OMP_NUM_THREADS=1" in checks["threads"]["found"]
    assert checks["disk"]["facts"]["folder"] == str(tmp_path)
    assert 0 < checks["memory"]["facts"]["free"] <= checks["memory"]["facts"]["total"]
    assert checks["mlflow"]["facts"]["store"] == "sqlite:///mlflow.db"
    assert checks["prefect"]["facts"]["server"] is None
    assert not any(tmp_path.iterdir()), "it only looks"
    heavy = {"mlflow", "prefect", "deepspeed", "webdataset"}
    assert not heavy & {line.split("|")[-1].strip() for line in loaded.splitlines()}


def test_it_fits_a_screen(r2id, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    code, out, _ = r2id("doctor", CONFIGS / "digits" / "pipeline.toml")
    assert code == 0 and out.endswith("ready to train\n") and out.count("\n") < 24
    fastest = "bfloat16" if bfloat16_is_fast(dist.init().device) else "float32"
    assert f"riae {fastest} (auto), r2id {fastest} (auto)" in out


def test_packages_that_do_not_fit(tmp_path: Path) -> None:
    """What r2id requires is read from its own metadata, here from others."""
    site, folder = tmp_path / "site", tmp_path / "folder"
    (site / "r2id-9.dist-info").mkdir(parents=True)
    (site / "r2id-9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: r2id\nVersion: 9\nRequires-Dist: numpy<1\n"
        "Requires-Dist: pydantic>=2\nRequires-Dist: not-there>=1\n"
        "Requires-Dist: nor-this; extra == 'dev'\n"
    )
    folder.mkdir()
    code, checks, _ = doctor(folder, before=site)
    wrong = checks["packages"]["facts"]["wrong"]
    assert code == 1 and checks["packages"]["state"] == "broken"
    assert wrong[0].startswith("numpy<1 (") and wrong[1:] == ["not-there>=1 (missing)"]
    assert "pip install" in checks["packages"]["advice"]


def test_a_torch_that_does_not_load(tmp_path: Path) -> None:
    site, folder = tmp_path / "site", tmp_path / "folder"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text('raise ImportError("libcudart.so.13: missing")')
    folder.mkdir()
    code, checks, _ = doctor(folder, before=site)
    assert code == 1 and checks["torch"]["found"] == "libcudart.so.13: missing"
    assert "install torch" in checks["torch"]["advice"] and "disk" in checks


def test_what_a_config_needs(tmp_path: Path) -> None:
    config = str(CONFIGS / "digits" / "riae.toml")
    code, checks, _ = doctor(
        tmp_path,
        config,
        "tracking.enabled=false",
        cores=1,
        CC="no-such-compiler",
        CXX="no-such-compiler",
        OMP_NUM_THREADS="2",
    )
    assert code == 0 and checks["compiler"]["state"] == checks["threads"]["state"] == "note"
    assert checks["threads"]["facts"]["cores"] == 1
    assert "export OMP_NUM_THREADS=1" in checks["threads"]["advice"]
    assert checks["mlflow"]["found"].startswith("not used")
    none = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    code, checks, _ = doctor(tmp_path, config, "train.compile=true", **none)
    assert code == 1 and checks["compiler"]["state"] == "broken"
    assert "build-essential python3-dev" in checks["compiler"]["advice"]


def test_a_gpu_needs_a_c_compiler_and_pythons_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "gcc"
    program.write_text("#!/bin/sh\necho small 1.0\n")
    program.chmod(0o755)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    found = _compiler({}, gpu=True)
    assert (found.state, found.found) == ("ok", "gcc: small 1.0")
    (tmp_path / "Python.h").unlink()
    found = _compiler({}, gpu=True)
    assert (found.state, found.found) == ("note", f"no Python.h in {tmp_path}")
    program.unlink()
    assert _compiler({}, gpu=True).found == "no C compiler (gcc, clang)"
    assert _compiler({}, gpu=False).found.startswith("no C++ compiler (")


PIPELINE = """
stage = "pipeline"
name = "small"
out = "runs"
[prepare]
dataset = "digits"
out = "data"
[riae]
config = "{configs}/riae.toml"
[r2id]
config = "{configs}/r2id.toml"
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    config = tmp_path / "pipeline.toml"
    config.write_text(PIPELINE.format(configs=CONFIGS / "digits"))
    return config


def test_a_pipeline_is_looked_at_as_it_runs(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline.parent)
    checks = {
        check["name"]: check for check in examine(pipeline, ["tracking.enabled=false"])["checks"]
    }
    assert checks["mlflow"]["found"].startswith("not used")
    with pytest.raises(InputError, match=r"riae\.config: .* of stage 'pipeline', must be 'riae'"):
        examine(pipeline, [f"riae.config={pipeline}"])


def test_disks_are_those_that_a_run_writes_to(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, other = pipeline.parent, Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == here.stat().st_dev:
        pytest.skip("needs two disks")
    monkeypatch.chdir(here)

    def disks(config: Path, *overrides: str) -> list[str]:
        checks = examine(config, overrides)["checks"]
        return [check["facts"]["folder"] for check in checks if check["name"] == "disk"]

    riae = CONFIGS / "digits" / "riae.toml"
    assert disks(riae) == disks(pipeline) == [str(here)]
    assert disks(riae, "run=/dev/shm/none/run") == [str(other)]
    assert disks(pipeline, "prepare.out=/dev/shm/none") == [str(other), str(here)]
    assert disks(pipeline, "out=/dev/shm/none") == [str(here), str(other)]
    found = examine(riae, ["run=/proc/none/run"])["checks"]  # where nobody can make a file
    assert [check["state"] for check in found if check["name"] == "disk"] == ["broken"]


def test_a_store_that_answers(answers, monkeypatch: pytest.MonkeyPatch) -> None:
    address, statuses = answers
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@{address}/")
    assert find_store() == (f"http://{address}/", f"answers 404 at http://{address}/health")
    for status in (200, 401, 403):
        statuses["/health"] = status
        assert find_store() == (f"http://{address}/", None)


def test_a_prefect_that_answers(answers, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is in the environment, in this folder's settings or in the active profile."""
    address, statuses = answers
    statuses["/api/health"] = 200
    monkeypatch.setenv("PREFECT_API_URL", f"http://{address}/api")
    assert find_server() == (f"http://{address}/api", None)
    monkeypatch.setenv("PREFECT_API_URL", f"http://{address}/other")
    assert "answers 404" in str(find_server()[1])
    monkeypatch.delenv("PREFECT_API_URL")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert find_server() == (None, None)
    (tmp_path / "profiles.toml").write_text(
        f'active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://{address}/api"\n'
        "[profiles.none]\n"
    )
    assert find_server() == (f"http://{address}/api", None)
    monkeypatch.setenv("PREFECT_PROFILE", "none")
    assert find_server() == (None, None)
    for file, table in {"pyproject.toml": "tool.prefect.api", "prefect.toml": "api"}.items():
        (tmp_path / file).write_text(f'[{table}]\nurl = "http://{address}/{file}"\n')
        assert find_server()[0] == f"http://{address}/{file}"


def test_servers_that_do_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is gone, and one accepts connections but says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{address}")
        assert "does not answer" in str(find_store()[1])
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://me:secret@{address}/mlflow")
        assert find_store() == (f"postgresql://{address}/mlflow", None)
    where, wrong = find_store()
    assert where == f"postgresql://{address}/mlflow" and "does not answer" in str(wrong)
    code, checks, _ = doctor(
        tmp_path, PREFECT_API_URL=f"http://{address}/api", MLFLOW_TRACKING_URI=f"http://{address}"
    )
    assert code == 1 and checks["prefect"]["state"] == "broken"
    assert "PREFECT_API_URL" in checks["prefect"]["advice"]
    assert checks["mlflow"]["state"] == "note", "training works without it"


def test_stores_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def wrong(uri: str) -> str | None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        return find_store()[1]

    store = tmp_path / "mlflow.db"
    assert wrong(f"sqlite:///{store}") is None, "it will be made"
    MlflowClient(f"sqlite:///{store}").search_experiments()
    assert wrong(f"sqlite:///{store}") is None
    (tmp_path / "other.db").touch()
    assert "is no store of MLflow" in str(wrong(f"sqlite:///{tmp_path}/other.db"))
    content = bytearray(store.read_bytes())
    content[:100] = bytes(100)
    store.write_bytes(content)
    assert "is damaged" in str(wrong(f"sqlite:///{store}"))
    assert "cannot be written" in str(wrong(f"sqlite:///{store}/in/a/file.db"))
    assert wrong(f"file://{tmp_path}/runs") is None and wrong(f"{tmp_path}/runs") is None


@pytest.mark.parametrize(
    ("target", "own", "runs"),
    [
        ("sm_86", (8, 9), True),  # an RTX 4090 with kernels of an RTX 3090
        ("sm_86", (8, 0), False),
        ("sm_90", (12, 0), False),  # an RTX 5080 with a torch for CUDA 12.4
        ("sm_120", (12, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("sm_100f", (10, 3), True),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
        ("gfx942", (9, 4), True),
    ],
)
def test_kernels_run_on_what_they_were_made_for(
    target: str, own: tuple[int, int], runs: bool
) -> None:
    assert _runs_on(target, own) == runs


def test_a_gpu_that_torch_has_no_kernels_for() -> None:
    """A GPU that says of itself what an RTX 5080 does, and what torch is asked of it."""
    cuda = SimpleNamespace(
        get_device_capability=lambda _index: (12, 0),
        get_device_name=lambda _index: "NVIDIA GeForce RTX 5080",
        get_arch_list=lambda: ["sm_80", "sm_86", "sm_90"],
    )
    found = _unsupported(SimpleNamespace(cuda=cuda, __version__="2.6.0+cu124"), 0)
    assert found is not None and found.state == "broken" and found.name == "cuda:0"
    assert "sm_120" in found.found and "sm_80, sm_86, sm_90" in found.found
    assert "CUDA 12.8" in found.advice
    cuda.get_arch_list = lambda: ["sm_90", "sm_100", "sm_120"]
    assert _unsupported(SimpleNamespace(cuda=cuda, __version__="2.9.0+cu128"), 0) is None
