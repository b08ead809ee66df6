"""Models of the hub, from a server that answers as it does: found, cached, refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from r2id.checkpoints import hub
from r2id.checkpoints.export import export
from r2id.files import write_json

pytest.importorskip("huggingface_hub")

FIRST, SECOND = "1" * 40, "2" * 40


@dataclass
class Hub:
    """A server of the hub's files."""

    address: str
    repositories: dict[str, dict[str, Path]]
    """Name → revision → the folder of its files. The commits are FIRST and SECOND."""
    requests: list[str] = field(default_factory=list)


def serve(served: Hub, handler: BaseHTTPRequestHandler) -> None:
    """Answer HEAD or GET of /owner/name/resolve/revision/file, and GET of /api/models/owner/name.

    The latter may be followed by /revision/revision.
    """
    served.requests.append(f"{handler.command} {handler.path}")
    parts = handler.path.partition("?")[0].strip("/").split("/")
    about = parts[:2] == ["api", "models"]
    parts = parts[2:] if about else parts
    revisions = served.repositories.get("/".join(parts[:2]))
    if revisions is None:
        return refuse(handler, 401, "RepoNotFound")
    if about:
        return tell(handler, "/".join(parts[:2]), revisions, (parts[3:] or ["main"])[0])
    if parts[3] not in revisions:
        return refuse(handler, 404, "RevisionNotFound")
    file = revisions[parts[3]].joinpath(*parts[4:])
    if file.parent.name == "gated":
        return refuse(handler, 403, "GatedRepo")
    if not file.is_file():
        return refuse(handler, 404, "EntryNotFound")
    content = file.read_bytes()
    handler.send_response(200)
    handler.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
    handler.send_header("X-Repo-Commit", FIRST if parts[3] in ("v1", FIRST) else SECOND)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(content)
    return None


def tell(
    handler: BaseHTTPRequestHandler, name: str, revisions: dict[str, Path], revision: str
) -> None:
    """Answer what a model is."""
    if revision not in revisions:
        return refuse(handler, 404, "RevisionNotFound")
    names = sorted(path.name for path in revisions[revision].iterdir())
    sha = FIRST if revision in ("v1", FIRST) else SECOND
    siblings = [{"rfilename": name} for name in names]
    content = json.dumps({"id": name, "sha": sha, "private": False, "siblings": siblings}).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
    return None


def refuse(handler: BaseHTTPRequestHandler, status: int, code: str) -> None:
    handler.send_response(status)
    handler.send_header("X-Error-Code", code)
    handler.send_header("X-Error-Message", "not here")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


@pytest.fixture(scope="module")
def models(r2id_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as they would be published: a model of now and one before it, and some that fail."""
    root = tmp_path_factory.mktemp("models")
    config = {"format": "r2id-model", "format_version": "2"}
    for name, changes, dtype in (
        ("new", {}, "float32"),
        ("old", {}, "bfloat16"),
        ("newer", {"format_version": "9"}, None),
        ("other", {"format": None}, None),
        ("half", {}, None),
        ("gated", {}, None),
    ):
        (root / name).mkdir()
        write_json(root / name / "config.json", {**config, **changes})
        if dtype:
            export(r2id_run, root / name / "model.safetensors", dtype=dtype)
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Hub]:
    served = Hub("", {})
    for name in ("newer", "other", "half", "gated", "empty"):
        served.repositories[f"me/{name}"] = {"main": models / name, SECOND: models / name}
    served.repositories["me/digits"] = {
        "main": models / "new",
        SECOND: models / "new",
        "v1": models / "old",
        FIRST: models / "old",
    }

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            serve(served, self)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.address = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    yield served
    running.shutdown()
    running.server_close()
    thread.join()


def python(home: Path, address: str, *words: str, **variables: str) -> tuple[int, str, str]:
    """Run Python as a user with this home of the hub's cache: (exit code, stdout, stderr)."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": address, "HF_HUB_DISABLE_TELEMETRY": "1"}
    home.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, *words],
        cwd=home,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def fetch(home: Path, address: str, *requests: tuple[str, ...], **variables: str) -> list[str]:
    """Fetch models in one process: for each the folder, or "error: " and the message."""
    program = """
import json, sys
from r2id.checkpoints.hub import fetch
from r2id.errors import InputError
for request in json.loads(sys.argv[1]):
    try:
        print(json.dumps(str(fetch(*request))))
    except InputError as error:
        print(json.dumps(f"error: {error}"))
"""
    code, out, errors = python(home, address, "-c", program, json.dumps(requests), **variables)
    assert code == 0, errors
    return [json.loads(line) for line in out.splitlines()]


def sample(home: Path, address: str, name: str, out: str, **variables: str) -> bytes:
    words = ("sample", name, "--size", "8x8", "--count", "2", "--steps", "1", "--out", out)
    code, _, errors = python(home, address, "-m", "r2id.cli", *words, **variables)
    assert code == 0, errors
    return (home / out).read_bytes()


def files_got(server: Hub) -> list[str]:
    return [request for request in server.requests if request.startswith("GET /me/")]


def test_a_model_is_fetched_once_and_draws_offline(server, models, tmp_path):
    expected = sample(tmp_path / "direct", "", str(models / "new"), "new.png")
    home = tmp_path / "home"
    assert sample(home, server.address, "me/digits", "online.png") == expected
    server.requests.clear()
    assert sample(home, server.address, "me/digits", "again.png") == expected
    assert not files_got(server)
    server.requests.clear()
    assert sample(home, server.address, "me/digits", "offline.png", HF_HUB_OFFLINE="1") == expected
    assert not server.requests
    # Without a word about it, but with nobody who answers.
    assert sample(home, "http://127.0.0.1:1", "me/digits", "alone.png") == expected


def test_revisions_and_another_cache(server, models, tmp_path):
    home, other = tmp_path / "home", str(tmp_path / "other")
    found = fetch(
        home,
        server.address,
        ("me/digits",),
        ("me/digits", "v1"),
        ("me/digits@v1",),
        ("me/digits", FIRST),
        ("me/digits", "v1", other),
        ("me/digits@main", "v1"),
    )
    for folder, name in zip(found, ("new", "old", "old", "old", "old", "old"), strict=True):
        content = (Path(folder) / "model.safetensors").read_bytes()
        assert content == (models / name / "model.safetensors").read_bytes()
    assert found[1] == found[2] == found[3] == found[5] and home in Path(found[1]).parents
    assert Path(other) in Path(found[4]).parents
    offline = fetch(home, "", ("me/digits", "v1"), ("me/digits", "v2"), HF_HUB_OFFLINE="1")
    assert offline[0] == found[1] and offline[1].startswith("error: me/digits: ")


def test_only_what_is_needed_is_fetched(server, tmp_path):
    server.requests.clear()
    fetch(tmp_path / "home", server.address, ("me/digits",), ("me/newer",), ("me/other",))
    assert [Path(request).name for request in files_got(server)] == [
        "config.json",
        "model.safetensors",
        "config.json",
        "config.json",
    ]


def test_what_cannot_be_had_is_one_line(server, tmp_path):
    requests = {
        ("me/none",): "no such file or folder here, and no such model on",
        ("me/digits", "v9"): "has no revision 'v9'",
        ("me/empty",): "holds no r2id model: there is no config.json",
        ("me/other",): "holds no r2id model: its config.json has no format 'r2id-model'",
        ("me/half",): "holds no r2id model: there is no model.safetensors",
        ("me/newer",): "format_version 9; this version of r2id reads 1, 2, 3",
        ("me/gated",): ": ask its owner for access, then run hf auth login",
        ("me/a--b",): "no name of the hub",
        ("nothing",): "must be a path, or a model of the hub as owner/name",
    }
    found = fetch(tmp_path / "home", server.address, *requests)
    for (request, message), line in zip(requests.items(), found, strict=True):
        assert line.startswith(f"error: {request[0]}: ") and message in line and "\n" not in line
    (offline,) = fetch(tmp_path / "new", server.address, ("me/digits",), HF_HUB_OFFLINE="1")
    assert f"cache {tmp_path / 'new' / 'hub'}, and HF_HUB_OFFLINE is set" in offline
    (alone,) = fetch(tmp_path / "new", "http://127.0.0.1:1", ("me/digits",))
    assert "and http://127.0.0.1:1 cannot be reached: " in alone and "\n" not in alone


def test_the_cache_without_the_weights(server, tmp_path):
    """As after a download that was broken off."""
    home = tmp_path / "home"
    (folder,) = fetch(home, server.address, ("me/digits",))
    weights = Path(folder) / "model.safetensors"
    weights.resolve().unlink()
    weights.unlink()
    (line,) = fetch(home, "", ("me/digits",), HF_HUB_OFFLINE="1")
    assert f"model.safetensors of revision {SECOND} is not in the hub's cache" in line
    assert fetch(home, server.address, ("me/digits",)) == [folder] and weights.is_file()


def test_the_command_says_it_in_one_line(server, tmp_path):
    command = ("-m", "r2id.cli", "sample", "me/none", "--out", "o.png")
    code, _, errors = python(tmp_path / "home", server.address, *command)
    assert code == 2 and errors.count("\n") == 1 and errors.startswith("error: me/none: no such")
    hidden = "import sys; sys.modules['huggingface_hub'] = None; from r2id.cli import main; main()"
    code, _, errors = python(tmp_path / "home", server.address, "-c", hidden, *command[2:])
    assert code == 2 and errors.count("\n") == 1 and "pip install 'r2id[hub]'" in errors


def test_paths_win(server, models, tmp_path, monkeypatch):
    """A folder of that name is taken; a name in a folder that is here is a path as well."""
    home = tmp_path / "home"
    (home / "me").mkdir(parents=True)
    shutil.copytree(models / "old", home / "me" / "digits")
    server.requests.clear()
    sample(home, server.address, "me/digits", "o.png")
    command = ("-m", "r2id.cli", "sample", "me/digitz", "--out", "o.png")
    code, _, errors = python(home, server.address, *command)
    assert code == 2 and "me/digitz: no such folder" in errors
    assert not server.requests
    monkeypatch.chdir(tmp_path)
    for name in ("you/digits", "you/digits@v1", "you/digits@refs/pr/1"):
        assert hub.is_hub_name(name)
    for name in ("digits", "/you/digits", "./you", "../you", "a/b/c", "you/r2id.safetensors"):
        assert not hub.is_hub_name(name)
