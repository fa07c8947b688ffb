"""What the scaling benchmark makes of when trials ran, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
from scaling import Work, scaling, suggestion_seconds


@pytest.fixture
def work(tmp_path: Path) -> Work:
    """Two processes: trials of 4 s and 2 s with 0.5 s between them, and one of 3 s a second later."""
    (tmp_path / "17").write_text("10.0 14.0\n14.5 16.5\n", encoding="utf-8")
    (tmp_path / "18").write_text("11.0 14.0\n", encoding="utf-8")
    return Work.read(tmp_path)


def test_time_runs_from_the_first_start_to_the_last_end(work: Work) -> None:
    assert work.seconds == 6.5
    assert work.trial_seconds == 9.0


def test_overhead_is_between_the_trials_of_one_process(work: Work) -> None:
    assert work.gaps == [0.5]


def test_trials_at_once_are_counted_and_one_that_ends_as_another_starts_is_not(tmp_path: Path) -> None:
    (tmp_path / "17").write_text("0.0 2.0\n2.0 3.0\n", encoding="utf-8")
    (tmp_path / "18").write_text("1.0 2.0\n", encoding="utf-8")
    assert Work.read(tmp_path).most_at_once == 2


def test_efficiency_is_against_one_worker() -> None:
    runs = [
        {"n_workers": 1, "seconds": 40.0, "whole_seconds": 50.0},
        {"n_workers": 4, "seconds": 10.0, "whole_seconds": 20.0},
    ]
    one, four = scaling(runs)
    assert (one["efficiency"], one["whole_efficiency"]) == (1.0, 1.0)
    assert (four["efficiency"], four["whole_efficiency"]) == (1.0, 0.625)


def test_a_suggestion_is_timed_over_the_last_three_whole_batches() -> None:
    events = [{"event": "trial_suggested", "batch": 0}] * 5
    for batch, (size, seconds) in enumerate([(4, 90.0), (4, 4.0), (4, 6.0), (4, 2.0), (1, 99.0)], start=1):
        events += [{"event": "trial_suggested", "batch": batch}] * size
        events.append({"event": "batch_proposed", "batch": batch, "seconds": seconds})
    assert suggestion_seconds(events) == 1.0
