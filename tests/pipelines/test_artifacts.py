"""What Prefect's page of a pipeline shows, on a real server."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect import flow
from prefect.client.orchestration import get_client

from pipelines.artifacts import show_mlflow_run, show_pipeline
from pipelines.orchestration import server_answers
from r2id.images import save_png
from r2id.mlflow_pages import run_page
from tests.pipelines.test_flows import apart

PAGE = run_page("7", "a" * 32, server="http://127.0.0.1:5000/")
STAGES = [
    {"stage": "prepare", "time": "2s", "result": "data/digits"},
    {"stage": "train riae", "time": "1m00s", "result": "step 300, loss 0.1"},
]


@flow(name="shows artifacts")
def shows_artifacts(picture: Path) -> None:
    show_mlflow_run(PAGE, "bash launch/mlflow.sh")
    lines = ["samples at 8x8: class accuracy 0.9", "report: runs/digits/report/report.html"]
    show_pipeline("digits", STAGES, lines, [picture.with_name("gone.png")])  # shows no page
    show_pipeline("digits", STAGES, lines, [picture])


def show(picture: Path) -> dict[str, tuple[Any, str]]:
    """Data and description of the flow's artifacts, by their keys; the server has others too."""
    run = shows_artifacts(picture, return_state=True).state_details.flow_run_id
    with get_client(sync_client=True) as client:
        return {
            str(artifact.key): (artifact.data, str(artifact.description))
            for artifact in client.read_artifacts()
            if artifact.flow_run_id == run
        }


def test_a_pipeline_shows_where_mlflow_is_its_stages_and_its_results(
    server: None, tmp_path: Path
) -> None:
    picture = save_png(torch.zeros(1, 4, 4), tmp_path / "8x8.png")
    found = apart(show, picture)
    assert set(found) == {"mlflow", "stages", "r2id"}
    link, first = found["mlflow"]
    assert f"({PAGE})" in link and "`bash launch/mlflow.sh`" in first
    assert json.loads(found["stages"][0]) == STAGES
    page = found["r2id"][0]
    assert "accuracy 0.9" in page and "report/report.html" in page
    (image,) = [line for line in page.splitlines() if line.startswith("![8x8]")]
    data = image.partition("base64,")[2].rstrip(")")
    assert base64.b64decode(data) == picture.read_bytes()


def test_no_proxy_is_asked_for_the_own_server(
    server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # where nobody is
    assert server_answers()
    with get_client(sync_client=True) as client:
        assert client.hello().status_code == 200
