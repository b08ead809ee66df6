"""The Prefect server of one's own: it is reached past a proxy, and tells why it does not start."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from pipelines import orchestration
from pipelines.orchestration import prefect_ready
from r2id.errors import WorkError


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1"),
        ({"NO_PROXY": "corp.example"}, "corp.example,127.0.0.1"),
        ({"no_proxy": "*", "NO_PROXY": "corp.example"}, "*"),
    ],
)
def test_what_needs_no_proxy_stays_so(
    before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("no_proxy", "NO_PROXY")
    for name in names:
        monkeypatch.setenv(name, before.get(name, ""))
    orchestration._keep_from_proxies()
    assert [os.environ[name] for name in names] == [after, after]


def test_one_that_does_not_start_names_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program that ends takes its place."""
    from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nsleep 0.3\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(orchestration, "_SILENT_SECONDS", 0.0)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with (
        temporary_settings(restore_defaults={PREFECT_API_URL}),
        pytest.raises(WorkError, match=rf"exit code 3.*{PREFECT_HOME.value()}$"),
        prefect_ready(),
    ):
        raise AssertionError("it has started")
    assert capsys.readouterr().err == "starting Prefect's server\n"
