"""A latent cache written by several processes is the one written by one; which runs it is for."""

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from data_prep.prepare import prepare
from r2id.config import PrepareConfig, load_config
from r2id.data.latent_writer import LatentWriter
from r2id.data.loader import eval_loader
from r2id.data.shards import ShardSet
from r2id.errors import InputError, WorkError
from r2id.models.codec import Codec
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.conftest import CONFIGS
from tests.data.conftest import write_set
from tests.training import children
from tests.training.children import Ranks
from tests.training.configs import riae_config


def test_two_processes_write_the_same_cache(riae_run, tmp_path):
    prepare(PrepareConfig(dataset="digits", out=tmp_path / "digits", shard_mb=0.5))
    encode(riae_run, tmp_path / "digits", tmp_path / "one")
    command = (
        "encode",
        "--riae",
        riae_run,
        "--shards",
        tmp_path / "digits",
        "--out",
        tmp_path / "two",
        "--json",
    )
    for number in range(2):  # the second finds all in place
        said = tmp_path / f"said-{number}"
        with closing(Ranks(2, said)) as ranks:
            assert ranks(children.command, *command) == [0, 0]
        assert said.read_text().count('"images": 1797') == 1, "the first process alone reports"
    assert '"reused": 1797' in said.read_text()
    files = [
        {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
        }
        for name in ("one", "two")
    ]
    assert len(files[0]) > 8 and files[0] == files[1]


def _encoded_by_each(_world, riae, shards, out):
    """How many shards this rank writes."""
    written = []
    write = LatentWriter.write

    def noted(self, split, number, latents):
        written.append((split, number))
        write(self, split, number, latents)

    LatentWriter.write = noted
    try:
        encode(riae, shards, out)
    finally:
        LatentWriter.write = write
    return len(written)


def test_images_go_to_the_device_as_bytes_and_have_the_latents_of_their_floats(
    riae_run, tmp_path, monkeypatch
):
    """Images of several aspect ratios, and mirrored ones."""
    sizes = [(8, 8), (8, 12), (12, 8), (16, 8)]
    write_set(tmp_path / "shards", {"train": [size for size in sizes for _ in range(5)]})
    codec = Codec.load(riae_run)
    codec = replace(codec, data=codec.data.model_copy(update={"flip": True}))
    monkeypatch.setattr("r2id.training.encode.Codec.load", lambda *_: codec)
    found, kinds = {}, set()

    def note(_writer, split, number, latents):
        found[split, number] = latents

    def noted(*arguments, **options):
        for part in eval_loader(*arguments, **options):
            kinds.add(part["image"].dtype)
            yield part

    monkeypatch.setattr(LatentWriter, "write", note)
    monkeypatch.setattr(LatentWriter, "finish", lambda _: None)
    monkeypatch.setattr("r2id.training.encode.eval_loader", noted)
    encode(riae_run, tmp_path / "shards", tmp_path / "latents", batch=3)
    assert kinds == {torch.uint8}
    shards = ShardSet.open(tmp_path / "shards")
    data, seen = codec.data.model_copy(update={"shards": tmp_path / "shards"}), 0
    for (split, number), latents in found.items():
        indices = shards.split(split).indices_in_shard(number)
        places = {int(index): place for place, index in enumerate(indices)}
        for part in eval_loader(shards, data, split, 3, indices=indices):
            plain, other = (
                codec.encode(images) for images in (part["image"], part["image"].flip(-1))
            )
            for row, index in enumerate(part["index"].tolist()):
                wanted = torch.stack([plain[row], other[row]])
                assert torch.equal(latents[places[index]], wanted)
                seen += 1
    assert seen == 20


def test_what_is_missing_is_shared_out_evenly(ranks, riae_run, tmp_path):
    """Every second shard is missing, all of which one rank would have had by their numbers."""
    shards, out = tmp_path / "digits", tmp_path / "latents"
    prepare(PrepareConfig(dataset="digits", out=shards, shard_mb=0.02))
    encode(riae_run, shards, out)
    whole = {path: path.read_bytes() for path in out.rglob("*.*")}
    missing = sorted(out.glob("train/*.safetensors"))[::2]
    assert len(missing) >= 4
    for path in missing:
        path.unlink()
    counts = ranks(_encoded_by_each, riae_run, shards, out)
    assert sum(counts) == len(missing) and max(counts) - min(counts) <= 1
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == whole


def test_images_are_loaded_by_as_many_processes_as_the_riae_was_trained_with(
    digits, tmp_path, monkeypatch
):
    train(riae_config(digits, tmp_path / "run", "train.steps=1", "data.workers=1"))
    workers = []

    def noted(data_set, data, *arguments, **options):
        workers.append(data.workers)
        return eval_loader(data_set, data, *arguments, **options)

    monkeypatch.setattr("r2id.training.encode.eval_loader", noted)
    encode(tmp_path / "run", digits, tmp_path / "as trained")
    encode(tmp_path / "run", digits, tmp_path / "none", workers=0)
    assert sorted({*workers}) == [0, 1] and workers == sorted(workers, reverse=True)


def test_a_shard_that_was_exchanged_is_not_encoded(riae_run, tmp_path):
    """Its images would decode, but their latents would go by the labels of others."""
    prepare(PrepareConfig(dataset="digits", out=tmp_path / "digits", shard_mb=0.5))
    first = ShardSet.open(tmp_path / "digits").split("train").files[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1] + b"x")  # within the tar's padding
    with pytest.raises(WorkError, match=rf"{first.name}: its content is not what r2id prepare"):
        encode(riae_run, tmp_path / "digits", tmp_path / "latents")
    assert not list((tmp_path / "latents").rglob("*.safetensors"))
    first.write_bytes(content)
    assert encode(riae_run, tmp_path / "digits", tmp_path / "latents")["reused"] == 0


def test_a_run_that_its_cache_is_not_for_leaves_nothing_behind(riae_run, tmp_path):
    prepare(PrepareConfig(dataset="digits", out=tmp_path / "digits"))
    encode(riae_run, tmp_path / "digits", tmp_path / "latents")
    config = load_config(
        CONFIGS / "digits" / "r2id.toml",
        [
            f"run={tmp_path / 'run'}",
            f"codec={riae_run}",
            f"data.shards={tmp_path / 'digits'}",
            f"data.latents={tmp_path / 'latents'}",
            "data.flip=true",
        ],
    )
    with pytest.raises(InputError, match=r"flip = True: .*latents holds no latents of mirrored"):
        train(config)
    assert not (tmp_path / "run").exists()
