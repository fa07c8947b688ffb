"""Which trial comes next, without Ray, Tune or training: trials end in any order, or never."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from milp_ray.config.search import SearchSection
from milp_ray.memory.space import SearchSpace
from milp_ray.search import conductor as conductor_module
from milp_ray.search.candidates import random_new_point
from milp_ray.search.conductor import Conductor, StudyProgress
from milp_ray.search.journal import Journal, TrialRecord, read_events, read_study
from milp_ray.search.results import load_result, trial_rows, write_trials
from milp_ray.search.rungs import RungRecord
from milp_ray.search.suggest import InlineProposer, Proposal, Question

SPACE = SearchSpace(5, (2, 4))
HEADER = {"digest": "d", "objectives": ["validation_loss", "rouge_l"], "n_initial": 4}


def section(**changes: Any) -> SearchSection:
    rule = {"proposals": "repeatable", "lookahead": 2}
    return SearchSection(**{"n_trials": 16, "n_initial": 4, "batch_size": 3, **rule, **changes})


def propose(question: Question) -> list[Proposal]:
    """Depends on all values, on their order and on what is pending, as a surrogate does."""
    values = [round((o.values or {}).get("validation_loss", -1.0) * 1e6) for o in question.observations]
    pending = [sum(layout.layers) * 10 + layout.rank for layout in question.pending]
    rng = np.random.default_rng([abs(v) for v in values] + pending + [question.batch])
    seen = {o.key for o in question.observations} | {layout.key for layout in question.pending}
    found = []
    for _ in range(question.n):
        point = random_new_point(SPACE, seen, rng)
        if point is not None:
            seen.add(SPACE.layout(point).canonical().key)
            found.append(Proposal(point, "saas_nehvi"))
    return found


def metrics(trial: TrialRecord) -> dict[str, Any]:
    rng = random.Random(trial.layout.key)
    return {
        "validation_loss": rng.uniform(1, 2),
        "rouge_l": rng.uniform(0, 50),
        "adapter_parameters": len(trial.layout.layers) * trial.layout.rank,
    }


class LateProposer(InlineProposer):
    """Answers after a random number of polls, as an actor does."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(propose)
        self._rng = rng

    def poll(self) -> list[Proposal] | None:
        return super().poll() if self._rng.random() < 0.2 else None


def conductor(
    path: Path, search: SearchSection, proposer: InlineProposer | None = None, **extra: Any
) -> Conductor:
    journal = Journal(path)
    if journal.state.header is None:
        journal.append("study_started", **HEADER)
    return Conductor(journal, SPACE, search, 0, proposer or InlineProposer(propose), **extra)


def run(path: Path, search: SearchSection, n_workers: int, order_seed: int, stop_after: int = 99) -> None:
    """Run trials, at most ``n_workers`` at once, each ending at a random moment, until ``stop_after``.

    ``order_seed`` is that of the order of their ends and of how long proposals take; 0: none takes any time.
    """
    rng = random.Random(order_seed)
    one = conductor(path, search, LateProposer(rng) if order_seed else None, n_slots=n_workers)
    running: list[TrialRecord] = []
    n_ended = 0
    while n_ended < stop_after:
        trial = one.next_trial() if len(running) < n_workers else None
        if isinstance(trial, TrialRecord):
            running.append(trial)
        elif running:
            ended = running.pop(rng.randrange(len(running)))
            if ended.index == 2:
                one.fail(2, "OutOfMemoryError")
            else:
                one.complete(ended.index, metrics(ended))
            n_ended += 1
        elif trial == "finished":
            break
    one._journal.close()


def trials_of(path: Path) -> list[tuple]:
    return [(t.index, t.batch, t.layout.key, dict(t.raw), t.status) for t in read_study(path).trials]


@pytest.mark.parametrize("lookahead", [0, 2, 5])
@pytest.mark.parametrize("n_workers", [1, 2, 3, 8])
def test_a_repeatable_study_is_the_same_whatever_the_timing(
    tmp_path: Path, n_workers: int, lookahead: int
) -> None:
    run(tmp_path / "one", section(lookahead=lookahead), 1, 0)
    run(tmp_path / "many", section(lookahead=lookahead), n_workers, order_seed=n_workers)
    assert trials_of(tmp_path / "one") == trials_of(tmp_path / "many")
    assert load_result(tmp_path / "one").front == load_result(tmp_path / "many").front
    assert len(trials_of(tmp_path / "one")) == 16


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_greedy_study_with_one_worker_is_the_same_however_long_proposals_take(
    tmp_path: Path, batch_size: int
) -> None:
    search = section(proposals="greedy", batch_size=batch_size)
    run(tmp_path / "prompt", search, 1, 0)
    for seed in (1, 2, 3):
        run(tmp_path / f"late-{seed}", search, 1, seed)
        assert trials_of(tmp_path / f"late-{seed}") == trials_of(tmp_path / "prompt")


@pytest.mark.parametrize("stop_after", [0, 1, 3, 4, 5, 7, 9, 13])
@pytest.mark.parametrize(("proposals", "n_workers"), [("repeatable", 3), ("greedy", 1)])
def test_a_killed_study_goes_on_where_it_stood(
    tmp_path: Path, proposals: str, n_workers: int, stop_after: int
) -> None:
    search = section(proposals=proposals)
    run(tmp_path / "whole", search, 1, 0)
    run(tmp_path / "killed", search, n_workers, 1, stop_after=stop_after)
    ended = [t for t in read_study(tmp_path / "killed").trials if t.has_ended]
    assert len(ended) == stop_after
    run(tmp_path / "killed", search, min(n_workers, 2), 2)
    state = read_study(tmp_path / "killed")
    assert trials_of(tmp_path / "killed") == trials_of(tmp_path / "whole")
    assert [state.trials[t.index] for t in ended] == ended  # none lost, none repeated
    assert state.finished is not None


@pytest.mark.parametrize("proposals", ["repeatable", "greedy"])
def test_a_journal_cut_off_after_any_line_leads_to_the_same_study(tmp_path: Path, proposals: str) -> None:
    """Even in the middle of a batch that was being written."""
    search = section(proposals=proposals)
    run(tmp_path / "whole", search, 1, 0)
    lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for n_lines in range(1, len(lines)):
        (tmp_path / "cut").write_bytes(b"".join(lines[:n_lines]))
        run(tmp_path / "cut", search, 1, 0)
        assert trials_of(tmp_path / "cut") == trials_of(tmp_path / "whole"), n_lines


@pytest.mark.parametrize("n_workers", [2, 4, 7])
def test_a_greedy_study_with_many_workers_repeats_no_layout_and_keeps_all_slots_busy(
    tmp_path: Path, n_workers: int
) -> None:
    search = section(proposals="greedy", n_trials=30, n_initial=8)
    one = conductor(tmp_path / "j", search, n_slots=n_workers)
    rng = random.Random(n_workers)
    running: list[TrialRecord] = []
    while True:
        while len(running) < n_workers and isinstance(trial := one.next_trial(), TrialRecord):
            running.append(trial)
        if not running:
            break
        assert len(running) == n_workers or len(one._trials) == 30, "a slot stands idle"
        ended = running.pop(rng.randrange(len(running)))
        one.complete(ended.index, metrics(ended))
    keys = [trial.layout.key for trial in read_study(tmp_path / "j").trials]
    assert len(keys) == len(set(keys)) == 30


def test_a_repeatable_batch_waits_for_the_trials_before_the_newest(tmp_path: Path) -> None:
    one = conductor(tmp_path / "j", section())
    handed = [one.next_trial() for _ in range(4)]
    assert one.next_trial() is None
    for index in (1, 2, 3):
        one.complete(index, metrics(one._trials[index]))
        assert one.next_trial() is None
    assert isinstance(handed[0], TrialRecord)
    one.complete(0, metrics(handed[0]))
    after = one.next_trial()
    assert isinstance(after, TrialRecord)
    assert (after.index, after.batch) == (4, 1)
    [asked] = [event for event in read_events(tmp_path / "j") if event["event"] == "batch_asked"]
    assert asked["pending"] == [2, 3]


def test_a_trial_that_is_stopped_early_has_ended_without_values(tmp_path: Path) -> None:
    one = conductor(tmp_path / "j", section())
    trial = one.next_trial()
    assert isinstance(trial, TrialRecord)
    record = RungRecord(trial.index, 0, 1, 64, 2.0, None, (2.0,), 3.0, 100, 4)
    one.reached_rung(record)
    one.stop(trial.index, 0, 1, seconds=3.0)
    one.complete(trial.index, metrics(trial))
    state = read_study(tmp_path / "j")
    assert state.trials[0].status == "stopped"
    assert state.trials[0].has_ended
    assert state.completed == []
    assert state.rungs == [record]
    assert load_result(tmp_path / "j").hypervolume is None


def test_no_more_trials_are_handed_out_than_may_run(tmp_path: Path) -> None:
    one = conductor(tmp_path / "j", section(max_concurrent_trials=2))
    first = one.next_trial()
    assert isinstance(first, TrialRecord)
    assert one.next_trial() is not None
    assert one.next_trial() is None
    one.complete(first.index, metrics(first))
    assert one.next_trial() is not None


def test_a_second_end_of_a_trial_changes_nothing(tmp_path: Path) -> None:
    one = conductor(tmp_path / "j", section())
    trial = one.next_trial()
    assert isinstance(trial, TrialRecord)
    one.complete(trial.index, metrics(trial))
    before = (tmp_path / "j").read_bytes()
    one.complete(trial.index, {**metrics(trial), "validation_loss": 0.0})
    one.fail(trial.index, "late")
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_values_that_are_not_finite_fail_the_trial(tmp_path: Path, loss: float | None) -> None:
    one = conductor(tmp_path / "j", section())
    trial = one.next_trial()
    assert isinstance(trial, TrialRecord)
    one.complete(trial.index, {**metrics(trial), "validation_loss": loss})
    failed = read_study(tmp_path / "j").trials[0]
    assert failed.status == "failed"
    assert failed.reason == "no finite value for validation_loss"


def test_a_study_ends_when_every_layout_has_been_measured(tmp_path: Path) -> None:
    small = SearchSpace(2, (2,))  # 10, 01, 11 and empty

    def propose_small(question: Question) -> list[Proposal]:
        seen = {o.key for o in question.observations}
        point = random_new_point(small, seen, np.random.default_rng(0))
        return [] if point is None else [Proposal(point, "random")]

    journal = Journal(tmp_path / "j")
    journal.append("study_started", **HEADER)
    one = Conductor(journal, small, section(), 0, InlineProposer(propose_small))
    while (trial := one.next_trial()) != "finished":
        assert isinstance(trial, TrialRecord)
        one.complete(trial.index, metrics(trial))
    assert one.is_over
    assert len(journal.state.trials) == 4
    assert one.result().exhausted


def test_slots_are_counted_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = {"slots": 1, "time": 0.0}
    monkeypatch.setattr(conductor_module.time, "monotonic", lambda: cluster["time"])
    one = conductor(tmp_path / "j", section(), n_slots=1, count_slots=lambda: int(cluster["slots"]))
    first = one.next_trial()
    assert isinstance(first, TrialRecord)
    assert one.next_trial() is None, "the slot is taken"
    cluster["slots"] = 3
    assert one.next_trial() is None, "it is not looked at all the time"
    cluster["time"] += 60
    assert [isinstance(one.next_trial(), TrialRecord) for _ in range(3)] == [True, True, False]
    cluster.update(slots=1, time=cluster["time"] + 60)
    one.complete(first.index, metrics(first))
    assert one.next_trial() is None, "two still run"
    one._journal.close()
    changes = [e["n_slots"] for e in read_events(tmp_path / "j") if e["event"] == "slots_changed"]
    assert changes == [3, 1]


def test_the_limit_of_the_configuration_goes_before_the_slots(tmp_path: Path) -> None:
    one = conductor(tmp_path / "j", section(max_concurrent_trials=2), n_slots=1)
    assert [isinstance(one.next_trial(), TrialRecord) for _ in range(3)] == [True, True, False]


def test_more_trials_may_be_asked_of_a_finished_study(tmp_path: Path) -> None:
    run(tmp_path / "j", section(n_trials=7), 1, 0)
    assert read_study(tmp_path / "j").finished
    run(tmp_path / "j", section(), 1, 0)
    run(tmp_path / "whole", section(), 1, 0)
    assert trials_of(tmp_path / "j") == trials_of(tmp_path / "whole")


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[StudyProgress] = []
    one = conductor(tmp_path / "j", section(n_trials=5, lookahead=0), on_progress=told.append)
    while (trial := one.next_trial()) != "finished":
        assert isinstance(trial, TrialRecord)
        one.complete(trial.index, metrics(trial))
    assert [p.n_ended for p in told] == [1, 2, 3, 4, 4, 4, 5]
    assert [p.is_suggesting for p in told] == [False] * 4 + [True, False, False]
    assert told[-1].hypervolume == one.result().hypervolume


def test_the_table_has_a_row_a_trial(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    run(tmp_path / "j", section(), 2, 0)
    result = load_result(tmp_path / "j")
    write_trials(result, tmp_path / "trials.parquet")
    rows = pq.read_table(tmp_path / "trials.parquet").to_pylist()
    assert rows == trial_rows(result)
    assert [row["index"] for row in rows] == list(range(16))
    assert rows[2]["status"] == "failed"
    assert rows[2]["validation_loss"] is None
    assert rows[2]["hypervolume"] == rows[1]["hypervolume"]
    assert rows[-1]["hypervolume"] == result.hypervolume
    assert {row["index"] for row in rows if row["on_front"]} == {point.index for point in result.front}
    raw = rows[0]
    assert SPACE.layout(result.trials[0].raw).canonical().key == raw["key"]
    assert len(raw["raw_layers"]) == len(raw["mask"]) == 5
