from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from comparison import algorithms, summary
from comparison.simulation import Suggestion, Told
from comparison.synthetic import few_layers

from milp_ray.search.suggest import Proposal, Question


def run(algorithm: str, seed: int, share: list[float], seconds: float, problem: str = "p") -> dict[str, Any]:
    """A run whose trials end every so many seconds."""
    return {
        "problem": problem,
        "algorithm": algorithm,
        "seed": seed,
        "ended": [seconds * (i + 1) for i in range(len(share))],
        "share": share,
        "suggestion_seconds": 1.0,
        "n_repeats": 0,
        "n_stopped": 0,
    }


@pytest.fixture
def runs() -> summary.Runs:
    return summary.by_problem(
        [
            run("ours_map", 0, [0.5, 0.96, 0.98], 10.0),
            run("ours_map", 1, [0.6, 0.97, 1.0], 10.0),
            run("optuna_motpe", 0, [0.4, 0.5, 0.90], 5.0),
            run("optuna_motpe", 1, [0.4, 0.5, 0.90], 5.0),
            run("ax_default", 0, [0.4, 0.5, 0.96], 20.0),
        ]
    )


def test_a_peer_with_fewer_trials_is_compared_after_as_many(runs: summary.Runs) -> None:
    fewer = summary.by_problem(
        [*(run for named in runs["p"].values() for run in named), run("ax_saasbo", 0, [0.5, 0.97], 9.0)]
    )
    numbers = summary.figures_of(fewer, n_trials=3)
    assert numbers["hypervolume_ratio_vs_ax"] == pytest.approx(0.965 / 0.97)
    assert numbers["by_problem"]["p"]["ax_saasbo"]["n_trials"] == 2


def test_early_stopping_is_timed_to_what_the_search_without_it_reaches(runs: summary.Runs) -> None:
    stopping = run("ours_map_stopping", 0, [0.5, 0.9, 0.95, 1.0], 4.0)
    every = summary.by_problem([*(run for named in runs["p"].values() for run in named), stopping])
    # 95 % of 0.99 is 0.9405: after 12 s with early stopping and 20 s of 30 s without.
    assert summary.figures_of(every, n_trials=3)["early_stopping"]["p"] == {
        "seconds_with": 12.0,
        "seconds_without": 20.0,
        "seconds_of_the_whole_search_without": 30.0,
        "ratio": pytest.approx(0.6),
        "ratio_to_the_whole": pytest.approx(0.4),
    }
    assert summary.figures_of(runs, n_trials=3)["early_stopping"] == {"p": None}


def test_shares_are_compared_at_equal_trials_and_times_at_the_best_peer(runs: summary.Runs) -> None:
    numbers = summary.figures_of(runs, n_trials=3)
    assert numbers["hypervolume_ratio_vs_ax"] == pytest.approx(0.99 / 0.96)
    assert numbers["hypervolume_ratio_vs_optuna_best"] == pytest.approx(0.99 / 0.90)
    assert numbers["hypervolume_ratio_vs_random"] is None
    # Ax is there after 60 s, ours after 20 s; MOTPE never is, and its short run is no good time.
    assert numbers["time_to_95pct_hypervolume_ratio_vs_best_peer"] == pytest.approx(3.0)
    assert numbers["peers_never_reached"] == []
    assert summary.figures_of(runs, n_trials=2)["hypervolume_ratio_vs_ax"] == pytest.approx(0.965 / 0.5)
    assert json.loads(json.dumps(numbers)) == numbers


def test_a_peer_that_never_got_there_counts_with_the_end_of_its_run() -> None:
    runs = summary.by_problem([run("ours_map", 0, [0.96], 10.0), run("random", 0, [0.1, 0.2], 40.0)])
    numbers = summary.figures_of(runs, n_trials=2)
    assert numbers["time_to_95pct_hypervolume_ratio_vs_best_peer"] == pytest.approx(8.0)
    assert numbers["peers_never_reached"] == ["p"]
    # Ax is given one trial alone: that its run ends soon says nothing.
    runs["p"]["ax_saasbo"].append(run("ax_saasbo", 0, [0.3], 1.0))
    shorter = summary.figures_of(runs, n_trials=2)
    assert shorter["time_to_95pct_hypervolume_ratio_vs_best_peer"] == pytest.approx(8.0)


def test_there_is_no_time_where_ours_never_got_there() -> None:
    runs = summary.by_problem([run("ours_map", 0, [0.5], 10.0), run("random", 0, [0.96], 40.0)])
    assert summary.figures_of(runs, n_trials=1)["time_to_95pct_hypervolume_ratio_vs_best_peer"] is None


def test_a_share_at_a_moment_is_that_of_the_trials_ended_by_then() -> None:
    one = run("random", 0, [0.2, 0.7], 10.0)
    assert [summary.share_at(one, seconds) for seconds in (9.9, 10.0, 19.0, 20.0, 99.0)] == [
        0.0,
        0.2,
        0.2,
        0.7,
        0.7,
    ]
    assert math.isinf(summary.time_to(one, 0.8))


def test_the_table_names_every_algorithm_best_first(runs: summary.Runs) -> None:
    lines = summary.table_of(summary.figures_of(runs, n_trials=3)).splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ") and "median" not in line]
    assert names == ["ours_map", "ax_default", "optuna_motpe"]


def test_algorithms_of_more_trials_are_printed_after_as_many_as_the_others_had(runs: summary.Runs) -> None:
    shorter = run("optuna_gp", 0, [0.5, 0.7], 9.0)
    every = summary.by_problem([*(run for named in runs["p"].values() for run in named), shorter])
    lines = summary.table_of(summary.figures_of(every, n_trials=3)).splitlines()
    after_two = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("  o")}
    assert lines[2].endswith("after 2")
    assert after_two == {"ours_map": "0.9650", "optuna_motpe": "0.5000", "optuna_gp": "0.7000"}


def test_the_figure_is_written(runs: summary.Runs, tmp_path: Path) -> None:
    path = summary.draw(runs, 3, tmp_path / "regret.png")
    assert path.read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------------- our own questions


def test_our_search_asks_as_a_study_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Initial points first; then questions with all that ended, in the order asked, and what is pending."""
    problem = few_layers()
    questions: list[Question] = []

    class Recording:
        def __init__(self, *arguments: object) -> None: ...

        def propose(self, question: Question) -> list[Proposal]:
            questions.append(question)
            return [Proposal(dict(problem.space.sample(rng)), "any") for _ in range(question.n)]

    import numpy as np

    rng = np.random.default_rng(0)
    monkeypatch.setattr(algorithms, "Suggester", Recording)
    monkeypatch.setattr("milp_ray.search.surrogate.warm_up", lambda section: None)
    ours = algorithms.Ours(problem, 0, "map")

    asked: list[Suggestion] = []
    while len(asked) < algorithms.N_INITIAL:
        asked += ours.ask(5, [])
    assert len(asked) == algorithms.N_INITIAL
    assert not questions
    *ended, running = asked
    for suggestion in reversed(ended):  # in another order than asked
        layout = problem.space.layout(suggestion.raw).canonical()
        values = dict(zip(problem.objectives, problem.truth(layout).tolist(), strict=True))
        ours.tell(Told(suggestion, layout, None if suggestion is ended[3] else values))

    assert len(ours.ask(2, [running])) == 2
    [question] = questions
    assert question.n == 2
    told = [o for o in question.observations if o.key != problem.space.layout(running.raw).canonical().key]
    assert [o.index for o in told] == list(range(algorithms.N_INITIAL - 1))
    assert [o.index for o in told if o.values is None] == [3]
    taken = {o.key for o in question.observations} | {
        layout.key for layout in getattr(question, "pending", ())
    }
    assert problem.space.layout(running.raw).canonical().key in taken


# --------------------------------------------------------------------------------------------------- cache


@pytest.fixture(scope="module")
def search(repository: Path) -> ModuleType:
    path = repository / "experiments" / "benchmarks" / "search.py"
    spec = importlib.util.spec_from_file_location("search_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_comparison_goes_on_where_it_was_interrupted(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    original = search.run_one

    def counting(problem: Any, algorithm: str, seed: int, n_trials: int) -> dict[str, Any]:
        made.append((algorithm, seed))
        return dict(original(problem, algorithm, seed, n_trials))

    monkeypatch.setattr(search, "run_one", counting)
    cache, slow = tmp_path / "runs.jsonl", {"n_slow_seeds": 1, "n_slow_trials": 5}
    first = search.all_runs(["few_layers"], ["random"], n_seeds=1, n_trials=6, **slow, cache=cache)
    cache.write_text(cache.read_text() + '{"problem": "few_la')  # a kill
    both = search.all_runs(["few_layers"], ["random"], n_seeds=2, n_trials=6, **slow, cache=cache)
    assert made == [("random", 0), ("random", 1)]
    assert both[0] == first[0]
    assert len(search.read_cache(cache)) == 2
    assert len(both[0]["share"]) == 6
    assert both[0]["share"] == sorted(both[0]["share"])
    # Other settings are another run.
    search.all_runs(["few_layers"], ["random"], n_seeds=1, n_trials=7, **slow, cache=cache)
    assert made[2:] == [("random", 0)]


def test_slow_algorithms_get_fewer_seeds_and_trials(
    search: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "run_one", lambda *arguments: {"share": [0.5] * arguments[3]})
    runs = search.all_runs(
        ["two_depths"],
        ["random", "ax_default"],
        n_seeds=3,
        n_slow_seeds=1,
        n_trials=5,
        n_slow_trials=2,
        cache=tmp_path / "runs.jsonl",
    )
    assert [(r["algorithm"], r["seed"], len(r["share"])) for r in runs] == [
        ("random", 0, 5),
        ("ax_default", 0, 2),
        ("random", 1, 5),
        ("random", 2, 5),
    ]
    own = search.all_runs(
        ["two_depths"],
        ["random", "ax_default", "ax_saasbo"],
        n_seeds=1,
        n_slow_seeds=1,
        n_trials=64,
        cache=tmp_path / "runs.jsonl",
    )
    assert [len(r["share"]) for r in own] == [64, 32, 12]
