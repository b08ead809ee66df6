"""A latent cache written by several processes is the one written by one."""

from contextlib import closing

from data_prep.prepare import prepare
from r2id.config import PrepareConfig
from r2id.training.encode import encode
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
