"""What is shown while the program runs: log lines and, on a terminal, a live line."""

import logging
import os
import sys

import pytest

from pipeline import progress as module
from pipeline.progress import Progress, duration, log_to_standard_error, stage, time_left


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds of the clock, to be set."""
    seconds = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: seconds[0])
    return seconds


def test_lines_come_now_and_then_with_an_estimate(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log_to_standard_error()
    with Progress(10, lambda it: f"{it.done}/10{time_left(it.seconds_left)}\n  more", done=2, every_s=10) as it:
        assert it.seconds_left is None
        for _ in range(4):
            clock[0] += 4
            it.advance()
        it.pause(16)  # 4 steps took 16 s, of which all were a pause: nothing of it counts
        clock[0] += 8
        it.reach(8)
    assert capsys.readouterr().err == "5/10, 0:20 left; more\n"
    assert (it.seconds, it.seconds_left) == (8.0, pytest.approx(8 / 6 * 2))


def test_a_stage_ends_with_its_seconds(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log_to_standard_error()
    with stage("sort", 2000, "lines") as running:
        clock[0] += 20
        running.reach_share(0.75)
    assert capsys.readouterr().err == "sort: 1,500 of 2,000 lines, 0:07 left\nsort: 20.0 s\n"
    with pytest.raises(KeyError), stage("sort"):
        raise KeyError
    assert capsys.readouterr().err == ""


def test_nothing_is_said_where_nothing_is_shown(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    log_to_standard_error()
    with Progress(10, lambda it: "said", every_s=0, shown=False) as it:
        it.advance()
        it.log()
    assert capsys.readouterr().err == ""


def test_ranks_after_the_first_show_errors_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, shown in (("0", "a notice\nan error\n"), ("3", "an error\n")):
        monkeypatch.setenv("RANK", rank)
        log_to_standard_error()
        logging.getLogger("dare.train").info("a notice")
        logging.getLogger("dare").error("an error")
        assert capsys.readouterr().err == shown


def test_a_live_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, end = os.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(end, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        log_to_standard_error()
        with Progress(4, lambda it: f"step {it.done}/4") as it:
            it.advance()
            logging.getLogger("dare").info("this stays")
        stream.flush()
        # A terminal hands out what it has by and by; a last byte of our own says that all was read.
        stream.write("\0")
        stream.flush()
        said = ""
        while "\0" not in said:
            said += os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "step 0/4" in said
    assert "step 1/4" in said
    assert "this stays\r\n" in said
    assert not it.logs


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3600, 36_061)] == ["0:00", "1:01", "1:00:00", "10:01:01"]
