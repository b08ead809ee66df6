"""What a person and what a log file get to see of a long step."""

import os
import pty
import subprocess
import sys

import pytest

from r2id import progress
from r2id.progress import Progress, counted, duration, track


@pytest.fixture
def every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)


def test_lines_tell_count_rate_time_left_and_note(
    every_time: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("train riae", 20, start=10, unit="images", per_item=64) as bar:
        bar.advance(5, note="loss 0.5")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("train riae: 15/20, ")
    assert "images/s" in lines[0]
    assert "left" in lines[0]
    assert lines[0].endswith("loss 0.5")
    assert lines[-1].startswith("train riae: 15/20, done in ")


def test_lines_tell_what_the_rate_counts(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train", 4, unit="images", rate_of="with previews and saving") as bar:
        bar.advance(2)
    assert capsys.readouterr().err.endswith(" left\n")
    assert " images/s with previews and saving, " in bar.status()


def test_nouns_go_with_their_numbers() -> None:
    assert counted(1, "image") == "1 image"
    assert [counted(number, "class", "classes") for number in (0, 1)] == ["0 classes", "1 class"]


def test_work_that_was_done_before_has_no_rate(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("encode", 20, start=20, unit="images"):
        pass
    assert capsys.readouterr().err == "encode: 20/20, done in 0s\n"


def test_lines_come_every_few_seconds_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(1000), "reading")) == list(range(1000))
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_failure_reads_stopped_and_a_hidden_one_says_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError), Progress("work", 3):
        raise KeyError
    assert "stopped" in capsys.readouterr().err
    with Progress("work", 3, shown=False) as hidden:
        hidden.advance()
    assert hidden.done == 1
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar() -> None:
    reader, writer = pty.openpty()
    code = "from r2id.progress import track\nfor _ in track(range(3), 'reading'): pass"
    subprocess.run(
        [sys.executable, "-c", code],
        stderr=writer,
        check=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(writer)
    shown = os.read(reader, 65536).decode()
    os.close(reader)
    assert "3/3" in shown
    assert "\x1b[" in shown


def test_durations_read_as_people_write_them() -> None:
    assert [duration(s) for s in (0.4, 59.6, 185, 7440)] == ["0s", "1m00s", "3m05s", "2h04m"]
