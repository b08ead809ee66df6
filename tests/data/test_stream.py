"""Shards streamed by webdataset and read by ranges, from a folder and from a real HTTP server."""

import functools
import http.server
import itertools
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from r2id.config import DataConfig, load_config
from r2id.data import remote
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.data.stream import fetch_index, stream_loader
from r2id.errors import InputError, WorkError
from r2id.images import to_float
from tests.conftest import CONFIGS, TINY_RIAE
from tests.data.conftest import MIXED, write_set
from tests.forked import FORKED


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


class Faulty(http.server.BaseHTTPRequestHandler):
    """Serves tars badly: two of five requests are refused, break off, or are never answered."""

    folder, fault, ranges, status = Path(), "", False, 503

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        content = (self.folder / self.path[1:]).read_bytes()
        if self.path.endswith(".tar") and self.server.turns() in (1, 2):
            self.server.faults.release()
            if self.fault == "silent":
                self.server.answers.wait()
                return
            if self.fault == "refused":
                self.send_error(self.status)
                return
            content, whole = content[: len(content) // 2], len(content)
        else:
            whole = len(content)
        if self.ranges and "Range" in self.headers:
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{whole}")
            whole = min(whole, last + 1) - first
        else:
            self.send_response(200)
        if self.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(whole))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@contextmanager
def serving(handler):
    """A server of this machine; yields it and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    turns = itertools.count()
    server.turns, server.faults = lambda: next(turns) % 5, threading.Semaphore(0)
    server.answers = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.answers.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(mixed):
    """The address of the mixed set on a server of this machine, which knows no ranges."""
    with serving(functools.partial(Quiet, directory=mixed.folder)) as (_, address):
        yield address


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(remote, "_WAITS", (0,) * 6)


@pytest.fixture(params=["folder", "http"])
def address(request, mixed):
    return str(mixed.folder) if request.param == "folder" else request.getfixturevalue("served")


def stream(shards, start=0, total=20, rank=0, world_size=1, batch=12, micro_batch=3, **changes):
    data = DataConfig(shards=shards.folder, stream=shards.address, **changes)
    return list(
        stream_loader(
            shards,
            data,
            split="train",
            batch=batch,
            micro_batch=micro_batch,
            seed=3,
            start_step=start,
            total_steps=total,
            rank=rank,
            world_size=world_size,
        )
    )


def test_streamed_samples_are_those_of_the_index(address, mixed, tmp_path):
    index = fetch_index(address, tmp_path / "index")
    assert not list((tmp_path / "index").rglob("*.tar"))
    local = {
        int(index): image
        for batch in eval_loader(mixed, DataConfig(shards=mixed.folder), "train", 50)
        for index, image in zip(batch["index"], batch["image"], strict=True)
    }
    steps = stream(index, total=40)
    assert [len(step) for step in steps] == [4] * 40
    seen = set()
    for part in (part for step in steps for part in step):
        for index, key, label, image in zip(
            part["index"].tolist(), part["sample_ids"], part["label"], part["image"], strict=True
        ):
            assert (
                key == mixed.split("train").key(index)
                and label == mixed.split("train").label[index]
            )
            assert torch.equal(to_float(image), local[index])
            seen.add(index)
    assert len(seen) > 0.95 * len(MIXED)


def test_single_reads_work_at_an_address_too(address, mixed, tmp_path):
    index = fetch_index(address, tmp_path / "index").split("train")
    assert [index.read(i) for i in (0, 77, 137)] == [
        mixed.split("train").read(i) for i in (0, 77, 137)
    ]


def test_ranks_and_workers_share_the_shards_and_make_equal_steps(mixed, tmp_path):
    index = fetch_index(str(mixed.folder), tmp_path / "index")
    ranks = [
        stream(index, total=8, rank=rank, world_size=2, workers=workers)
        for rank, workers in ((0, 0), (1, 0), (0, 2))
    ]
    assert [len(steps) for steps in ranks] == [8, 8, 8]
    assert all(len(step) == 2 for steps in ranks for step in steps)
    shard = mixed.split("train").shard
    first = [
        {int(i) for part in steps[0] for i in shard[part["index"].numpy()]} for steps in ranks[:2]
    ]
    assert not first[0] & first[1]
    with pytest.raises(InputError, match=r"data\.stream: .* 7 .* 8 "):
        stream(index, world_size=4, micro_batch=3, workers=2)


def test_epochs_and_resumed_runs_have_orders_of_their_own(mixed, tmp_path):
    index = fetch_index(str(mixed.folder), tmp_path / "index")
    keys = [
        [
            key
            for step in stream(index, start, start + 6)
            for part in step
            for key in part["sample_ids"]
        ]
        for start in (0, 6)
    ]
    assert keys[0] == [
        key for step in stream(index, 0, 6) for part in step for key in part["sample_ids"]
    ]
    assert keys[0] != keys[1]
    assert len(stream(index, 6, 9)) == 3


@pytest.mark.parametrize(("per_shard", "buffer"), [(24, 500), (3, 1)])
def test_passes_differ_in_order_and_in_what_is_mirrored(tmp_path, monkeypatch, per_shard, buffer):
    """In one shard samples are shuffled; of many, without a buffer for that, the shards are."""
    monkeypatch.setattr("r2id.data.stream._BUFFER", buffer)
    shards = write_set(tmp_path / "set", {"train": [(8, 8)] * 24}, per_shard)
    shards = ShardSet.open(shards.folder, str(shards.folder))
    [whole] = eval_loader(shards, DataConfig(shards=shards.folder), "train", 24)
    steps = stream(shards, total=6, flip=True)  # of 12 samples: three passes
    orders = torch.cat([part["index"] for step in steps for part in step]).split(24)
    images = torch.cat([part["image"] for step in steps for part in step]).split(24)
    mirrored = []
    for order, shown in zip(orders, images, strict=True):
        assert sorted(order.tolist()) == list(range(24))
        changed = (to_float(shown) != whole["image"][order]).flatten(1).any(1)
        mirrored.append(frozenset(order[changed].tolist()))
    assert len({tuple(order.tolist()) for order in orders}) == len(set(mirrored)) == 3
    assert all(6 <= len(some) <= 18 for some in mirrored)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_not_what_the_index_says(own_mixed, tmp_path, workers):
    index = fetch_index(str(own_mixed.folder), tmp_path / "index")
    shard = own_mixed.split("train").files[2]
    whole = shard.read_bytes()
    cut = 512 * (whole[: len(whole) // 2].rfind(b"image-", 0) // 512)  # at the border of a member
    for content, words in (
        (whole[:cut], "cut short"),
        (whole[: cut + 100], "cannot be read|cut short"),
        (own_mixed.split("train").files[3].read_bytes(), "other samples than its index says"),
        (None, "no such file"),
    ):
        shard.unlink(missing_ok=True)
        if content is not None:
            shard.write_bytes(content)
        with pytest.raises(WorkError, match=rf"shard-000002\.tar: .*({words})") as caught:
            stream(index, total=20, workers=workers)
        assert "\n" not in str(caught.value)


def test_an_index_that_is_not_the_manifests(own_mixed, tmp_path):
    with (own_mixed.folder / "train" / "shard-000001.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(WorkError, match=r"train/shard-000001\.parquet: damaged: its hash"):
        fetch_index(str(own_mixed.folder), tmp_path / "index")


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("fault", ["refused", "cut"])
def test_a_faulty_server_changes_nothing(mixed, tmp_path, capfd, fault, ranges):
    """Every sample comes once, in the order of a server without faults."""
    handler = type("Handler", (Faulty,), {"folder": mixed.folder, "fault": fault, "ranges": ranges})
    expected = stream(fetch_index(str(mixed.folder), tmp_path / "here"), total=30)
    with serving(handler) as (server, address):
        index = fetch_index(address, tmp_path / "index")
        found = stream(index, total=30, workers=1)
        assert server.faults.acquire(blocking=False)
        single = [index.split("train").read(number) for number in range(6)]
    assert ": trying again in 0 s" in capfd.readouterr().err
    for step, other in zip(found, expected, strict=True):
        for part, same in zip(step, other, strict=True):
            assert part["sample_ids"] == same["sample_ids"]
            assert torch.equal(part["image"], same["image"])
    assert single == [mixed.split("train").read(number) for number in range(6)]


def test_a_server_that_is_silent_is_asked_again(mixed, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_SILENCE", 0.2)
    handler = type("Handler", (Faulty,), {"folder": mixed.folder, "fault": "silent"})
    with serving(handler) as (_, address):
        index = fetch_index(address, tmp_path / "index").split("train")
        assert [index.read(n) for n in range(4)] == [mixed.split("train").read(n) for n in range(4)]


@pytest.mark.parametrize(("status", "further_tries"), [(503, 6), (429, 6), (403, 0)])
def test_a_server_that_stays_busy_or_forbids(mixed, tmp_path, capfd, status, further_tries):
    kind = {"folder": mixed.folder, "fault": "refused", "status": status}
    with serving(type("Handler", (Faulty,), kind)) as (server, address):
        index = fetch_index(address, tmp_path / "index")
        server.turns = lambda: 1
        for read in (lambda: stream(index), lambda: index.split("train").read(0)):
            with pytest.raises(WorkError, match=rf"shard-00000\d\.tar: cannot be read: .*{status}"):
                read()
            assert capfd.readouterr().err.count("trying again") == further_tries


def test_a_file_that_another_store_does_not_have():
    """Such as s3fs, whose FileNotFoundError is caused by the store's own error."""
    error = FileNotFoundError("bucket/x.tar")
    error.__cause__ = Exception("An error occurred (404)")
    with pytest.raises(WorkError, match=r"^s3://bucket/x\.tar: no such file$"):
        remote.Attempts("s3://bucket", "x.tar").failed(error)


def read_for_ever(index, _kept):
    stream(index, workers=2)


def test_loader_processes_end_with_their_parent(mixed, tmp_path):
    """Loaders that wait for a server hold an end of a pipe for as long as they live."""
    handler = type("Handler", (Faulty,), {"folder": mixed.folder, "fault": "silent"})
    with serving(handler) as (server, address):
        index = fetch_index(address, tmp_path / "index")
        server.turns = lambda: 1
        ended, kept = FORKED.Pipe(duplex=False)
        process = FORKED.Process(target=read_for_ever, args=(index, kept))
        process.start()
        kept.close()
        assert server.faults.acquire(timeout=60) and server.faults.acquire(timeout=60)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert ended.poll(60)


def test_addresses_without_a_set(served, own_mixed, tmp_path):
    with pytest.raises(WorkError, match=r"nowhere/manifest\.json"):
        fetch_index(f"{served}/nowhere", tmp_path / "index")
    with pytest.raises(WorkError, match=r"127\.0\.0\.1:9"):
        fetch_index("http://127.0.0.1:9", tmp_path / "index")
    other = write_set(tmp_path / "other", {"train": [(4, 4)]})
    fetch_index(str(other.folder), tmp_path / "index")
    with pytest.raises(InputError, match="index"):
        fetch_index(served, tmp_path / "index")
    (own_mixed.folder / "manifest.json").write_text("{}")
    with (
        serving(functools.partial(Quiet, directory=own_mixed.folder)) as (_, address),
        pytest.raises(InputError, match=r"manifest\.json: .*None"),
    ):
        fetch_index(address, tmp_path / "new")


def test_training_from_a_stream(digits, tmp_path):
    """The index in one folder, the tars in another."""
    from r2id.training.loop import train

    shutil.copytree(digits, tmp_path / "far")
    fetch_index(str(tmp_path / "far"), tmp_path / "near")
    config = load_config(
        CONFIGS / "digits" / "riae.toml",
        [
            *TINY_RIAE,
            "train.steps=3",
            f"run={tmp_path / 'run'}",
            f"data.shards={tmp_path / 'near'}",
            f"data.stream={tmp_path / 'far'}",
        ],
    )
    assert train(config)["step"] == 3
    assert not list((tmp_path / "near").rglob("*.tar"))
    assert (
        ShardSet.open(tmp_path / "near", str(tmp_path / "far")).digest
        == ShardSet.open(digits).digest
    )
