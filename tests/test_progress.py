from __future__ import annotations

import io

import pytest

from milp_ray.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_one_line_for_a_short_stage() -> None:
    log = io.StringIO()
    with progress("personalize", 3, unit="users", file=log) as bar:
        for _ in range(3):
            bar.advance()
    assert log.getvalue() == "personalize: 3/3 users, 0 s\n"


def test_a_log_gets_a_line_an_interval_with_the_latest_note(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("milp_ray.progress.time.monotonic", lambda: clock[0])
    log = io.StringIO()
    with progress("search", 100, unit="trials", file=log, interval=10) as bar:
        for i in range(100):
            clock[0] += 0.25
            bar.advance(note="1 failed" if i == 59 else None)
    assert log.getvalue().splitlines() == [
        "search: 40/100 trials, 10 s",
        "search: 80/100 trials, 1 failed, 20 s",
        "search: 100/100 trials, 1 failed, 25 s",
    ]


def test_the_last_line_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("milp_ray.progress.time.monotonic", lambda: clock[0])
    log = io.StringIO()
    with progress("search", 1, file=log, interval=10) as bar:
        clock[0] = 11.0
        bar.advance()
    assert log.getvalue() == "search: 1/1, 11 s\n"


def test_an_unknown_total_can_be_told_later() -> None:
    log = io.StringIO()
    with progress("users", file=log, interval=0) as bar:
        bar.advance()
        bar.set_total(5)
        bar.advance(2)
    assert log.getvalue().splitlines() == ["users: 1, 0 s", "users: 3/5, 0 s"]


def test_a_failing_stage_says_how_far_it_came() -> None:
    log = io.StringIO()

    def interrupted() -> None:
        with progress("personalize", 9, file=log) as bar:
            bar.advance(4)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert log.getvalue() == "personalize: 4/9, 0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    with progress("personalize", 3, unit="users", file=terminal) as bar:
        bar.advance(3, note="1 failed")
    assert "3/3" in terminal.getvalue()
    assert "1 failed" in terminal.getvalue()
    assert "\x1b[" in terminal.getvalue()


def test_the_pace_of_late_says_how_long_the_rest_will_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("milp_ray.progress.time.monotonic", lambda: clock[0])
    log = io.StringIO()
    with progress("personalize", 1500, unit="users", file=log, interval=60, pace=True) as bar:
        for _ in range(1000):
            bar.advance(worked=False)  # finished before: it says nothing about the pace
        for second in range(240):
            clock[0] += 1.0
            if second % 2 or second >= 120:  # new workers joined
                bar.advance(note="1 failed")
    assert log.getvalue().splitlines() == [
        "personalize: 1030/1500 users, 1 failed, 60 s, 30 users a minute, 16 min left",
        "personalize: 1060/1500 users, 1 failed, 120 s, 30 users a minute, 15 min left",
        "personalize: 1120/1500 users, 1 failed, 180 s, 45 users a minute, 8 min left",
        "personalize: 1180/1500 users, 1 failed, 240 s, 60 users a minute, 5 min left",
    ]


def test_a_bar_shows_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    clock = [0.0]
    monkeypatch.setattr("milp_ray.progress.time.monotonic", lambda: clock[0])
    terminal = Terminal()
    with progress("personalize", 30, unit="users", file=terminal, pace=True) as bar:
        clock[0] = 10.0
        bar.advance(10, note="1 failed")
    assert "60 users a minute, 20 s left, 1 failed" in terminal.getvalue()
