"""Shards streamed by webdataset and read by ranges, from a folder and from a real HTTP server."""

import functools
import http.server
import shutil
import threading
from contextlib import contextmanager

import pytest
import torch

from r2id.config import DataConfig, load_config
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.data.stream import fetch_index, stream_loader
from r2id.errors import InputError, WorkError
from r2id.images import to_float
from tests.conftest import CONFIGS, TINY_RIAE
from tests.data.conftest import MIXED, write_set


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def server_of(folder):
    """The address of a folder on a server of this machine, which knows no ranges."""
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def served(mixed):
    """The address of the mixed set on such a server."""
    with server_of(mixed.folder) as address:
        yield address


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
    remote = fetch_index(address, tmp_path / "index")
    assert not list((tmp_path / "index").rglob("*.tar"))
    local = {
        int(index): image
        for batch in eval_loader(mixed, DataConfig(shards=mixed.folder), "train", 50)
        for index, image in zip(batch["index"], batch["image"], strict=True)
    }
    steps = stream(remote, total=40)
    assert [part["step"] for step in steps for part in step] == [
        step for step in range(40) for _ in range(4)
    ]
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
    remote = fetch_index(address, tmp_path / "index").split("train")
    assert [remote.read(i) for i in (0, 77, 137)] == [
        mixed.split("train").read(i) for i in (0, 77, 137)
    ]


def test_ranks_and_workers_share_the_shards_and_make_equal_steps(mixed, tmp_path):
    remote = fetch_index(str(mixed.folder), tmp_path / "index")
    ranks = [
        stream(remote, total=8, rank=rank, world_size=2, workers=workers)
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
        stream(remote, world_size=4, micro_batch=3, workers=2)


def test_epochs_and_resumed_runs_have_orders_of_their_own(mixed, tmp_path):
    remote = fetch_index(str(mixed.folder), tmp_path / "index")
    keys = [
        [
            key
            for step in stream(remote, start, start + 6)
            for part in step
            for key in part["sample_ids"]
        ]
        for start in (0, 6)
    ]
    assert keys[0] == [
        key for step in stream(remote, 0, 6) for part in step for key in part["sample_ids"]
    ]
    assert keys[0] != keys[1]
    assert [step[0]["step"] for step in stream(remote, 6, 9)] == [6, 7, 8]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_not_what_the_index_says(own_mixed, tmp_path, workers):
    remote = fetch_index(str(own_mixed.folder), tmp_path / "index")
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
            stream(remote, total=20, workers=workers)
        assert "\n" not in str(caught.value)


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
        server_of(own_mixed.folder) as address,
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
