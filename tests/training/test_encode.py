"""A latent cache written by several processes is the one written by one; which runs it is for."""

from contextlib import closing

import pytest

from data_prep.prepare import prepare
from r2id.config import PrepareConfig, load_config
from r2id.errors import InputError
from r2id.training.encode import encode
from r2id.training.loop import train
from tests.conftest import CONFIGS
from tests.training import children
from tests.training.children import Ranks


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
