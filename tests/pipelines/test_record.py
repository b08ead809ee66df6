"""What a pipeline remembers: in a copy, after a move, and of what MLflow did not take."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from pipelines import mlflow_run
from pipelines.mlflow_run import MlflowRun
from pipelines.record import Record
from r2id.config import PipelineRun, load_config
from r2id.errors import InputError
from tests.pipelines.test_settings import PIPELINE


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a pipeline that has drawn a picture and written a report."""
    out = tmp_path / "out"
    for file in ("samples/8x8.png", "report/report.html", "report/metrics.json"):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text("{}")
    return out


def keep(out: Path) -> Record:
    record, picture = Record(out), str(out / "samples/8x8.png")
    note = {"params": {"steps": 20}, "times": (100.0, 114.0), "folder": out / "samples"}
    record.keep("sample", "key", {"files": [picture]}, (), note)
    return record


def names(record: Record) -> list[str]:
    return [stage["name"] for stage in record.missing_in_mlflow()]


def test_what_mlflow_lacks_is_remembered_until_it_has_it(out: Path) -> None:
    keep(out).note("encode", {"images": 7}, (90.0, 100.0))  # and killed before MLflow was told
    record = Record(out)
    record.set_mlflow_run("a run", "0")
    sample, encode = record.missing_in_mlflow()
    assert sample["artifacts"] == [str(out / "samples")]
    assert encode == {
        "name": "encode",
        "params": {"images": 7},
        "times": [90.0, 100.0],
        "artifacts": [],
        "metrics": {},
    }
    record.all_recorded()
    assert names(Record(out)) == []
    record.note("encode", {"images": 8}, (200.0, 201.0))
    assert names(Record(out)) == ["encode"]
    record.set_mlflow_run("another, because that one was deleted", "0")
    assert names(Record(out)) == ["sample", "encode"]


def test_a_record_without_times_is_read(out: Path) -> None:
    file = keep(out).file
    content = json.loads(file.read_text())
    del content["notes"]["sample"]["times"]
    file.write_text(json.dumps(content))
    record = Record(out)
    record.set_mlflow_run("a run", "0")
    (sample,) = record.missing_in_mlflow()
    assert sample["times"] is None


def test_a_copy_has_its_own_pictures_and_its_own_run(out: Path, tmp_path: Path) -> None:
    keep(out).set_mlflow_run("a run", "0")
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    record = Record(copy)
    assert record.find("sample", "key") == {"files": [str(copy / "samples/8x8.png")]}
    assert record.mlflow_run is None and Record(out).mlflow_run == "a run"
    assert record.find("sample", "another key") is None
    (copy / "samples/8x8.png").unlink()
    assert record.find("sample", "key") is None


def test_a_relative_out_is_the_same_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(out).set_mlflow_run("a run", "0")
    monkeypatch.chdir(out.parent)
    record = Record(Path("out"))
    assert record.mlflow_run == "a run"
    assert record.find("sample", "key") == {"files": ["out/samples/8x8.png"]}


def test_a_damaged_record_is_named(out: Path) -> None:
    (out / "pipeline.json").write_text("{")
    with pytest.raises(InputError, match=r"pipeline\.json: damaged"):
        Record(out)


@pytest.mark.slow
def test_what_a_locked_store_did_not_take_is_recorded_later(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    store = f"sqlite:///{tmp_path}/mlflow.db?timeout=0.2"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    (tmp_path / "pipeline.toml").write_text(PIPELINE.format(out=out))
    monkeypatch.setattr(
        mlflow_run, "show_mlflow_run", lambda *_: None
    )  # Prefect has no server here
    config = load_config(tmp_path / "pipeline.toml")
    assert isinstance(config, PipelineRun)

    keep(out)
    mlflow = MlflowRun(config, Record(out))
    mlflow.begin()
    with sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None) as other:
        other.execute("BEGIN EXCLUSIVE")
        mlflow.end("KILLED", [], [])
        other.execute("ROLLBACK")
    assert "run the same command again" in capsys.readouterr().err
    assert names(Record(out)) == ["sample"]
    mlflow.end("FINISHED", ["accuracy 0.9"], ["8x8.png"])
    client = MlflowClient(tracking_uri=store)
    record = json.loads((out / "pipeline.json").read_text())
    (parent,) = [
        run
        for run in client.search_runs([record["mlflow_experiment"]])
        if run.data.tags["stage"] == "pipeline"
    ]
    assert (parent.info.run_id, parent.info.status) == (record["mlflow_run"], "FINISHED")
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "samples")] == [
        "samples/8x8.png"
    ]
    assert names(Record(out)) == []
