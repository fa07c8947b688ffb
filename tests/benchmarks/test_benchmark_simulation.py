from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from comparison.algorithms import Random
from comparison.problem import Curve
from comparison.simulation import MAX_REPEATS, EarlyStopping, Suggestion, Told, simulate
from comparison.synthetic import Effect, Synthetic

from milp_ray.memory.layout import CanonicalLayout
from milp_ray.memory.space import SearchSpace
from milp_ray.search.features import CanonicalRows


class Timed(Synthetic):
    """A trial of k LoRAs takes k seconds an epoch, and one second at its end."""

    def evaluate(self, layout: CanonicalLayout) -> Curve:
        curve = super().evaluate(layout)
        epochs = np.arange(1, self.n_epochs + 1)
        return Curve(curve.values, epochs * float(sum(layout.mask)), 1.0, curve.per_user)


@pytest.fixture
def problem() -> Timed:
    effects = {"validation_loss": Effect({0: 0.3}, {}, 2.0)}
    objectives = ("validation_loss", "adapter_parameters")
    return Timed("timed", effects, objectives, space=SearchSpace(4, (8, 16)), n_epochs=10)


class Listed:
    """Suggests given layouts in turn, and remembers what it is asked and told."""

    def __init__(self, problem: Synthetic, n_loras: Sequence[int], rank: int = 8) -> None:
        masks = [tuple(i < n for i in range(4)) for n in n_loras]
        self._raws = iter([problem.space.raw(CanonicalLayout(mask, rank)) for mask in masks])
        self.pending: list[int] = []
        self.told: list[Told] = []

    def ask(self, n: int, pending: Sequence[Suggestion]) -> list[Suggestion]:
        self.pending.append(len(pending))
        return [Suggestion(raw) for raw in itertools.islice(self._raws, n)]

    def tell(self, told: Told) -> None:
        self.told.append(told)


def instant() -> float:
    return 0.0


def test_workers_run_trials_side_by_side(problem: Timed) -> None:
    run = simulate(problem, Listed(problem, [1, 2, 3, 4]), n_trials=4, n_workers=2, clock=instant)
    # 10 s an epoch count and layer, 1 s to score: the third starts when the first ends, and so on.
    assert [(trial.started, trial.ended) for trial in run.trials] == [(0, 11), (0, 21), (11, 42), (21, 62)]
    assert len(run.hypervolumes) == 4
    assert all(a <= b for a, b in itertools.pairwise(run.hypervolumes))


def test_suggestions_take_their_time_while_trials_go_on(problem: Timed) -> None:
    ticks = itertools.count(step=5)  # every reading is 5 s later: asking takes 5 s, telling 5 s
    run = simulate(
        problem, Listed(problem, [1, 2, 3]), n_trials=3, n_workers=1, clock=lambda: float(next(ticks))
    )
    starts = [trial.started for trial in run.trials]
    # Ask 5; then from a trial's end tell 5 and ask 5.
    assert starts == [5, 5 + 11 + 10, 26 + 21 + 10]
    assert run.suggestion_seconds == 3 * 5 + 3 * 5


def test_the_algorithm_knows_what_is_pending(problem: Timed) -> None:
    algorithm = Listed(problem, [1, 2, 3, 4])
    simulate(problem, algorithm, n_trials=4, n_workers=2, clock=instant)
    assert algorithm.pending == [0, 1, 1]


def test_a_stopped_trial_frees_its_worker_and_is_told_without_values(problem: Timed) -> None:
    seen: list[dict[int, Sequence[float]]] = []

    def only_the_first(records: Mapping[int, Sequence[float]], candidate: int, eta: float) -> bool:
        seen.append(dict(records))
        return candidate == 0

    stopping = EarlyStopping(only_the_first, eta=3, first=1, n_rungs=9, min_records=1)
    algorithm = Listed(problem, [1, 2, 3])
    run = simulate(problem, algorithm, n_trials=3, n_workers=1, clock=instant, early_stopping=stopping)
    assert stopping.epochs(10) == [1, 3, 9]
    assert [(t.ended - t.started, t.was_stopped, t.epochs) for t in run.trials] == [
        (11, False, 10),
        (2, True, 1),
        (3, True, 1),
    ]
    assert [told.values is None for told in algorithm.told] == [False, True, True]
    assert run.hypervolumes[0] == run.hypervolumes[-1]
    # The first trial met three rungs; a rung knows all that reached it.
    assert [len(records) for records in seen] == [1, 1, 1, 2, 3]


def test_rungs_stop_nothing_before_there_are_enough_records(problem: Timed) -> None:
    stopping = EarlyStopping(lambda records, candidate, eta: False, min_records=3)
    run = simulate(
        problem, Listed(problem, [1, 2, 3]), n_trials=3, n_workers=1, clock=instant, early_stopping=stopping
    )
    assert [trial.was_stopped for trial in run.trials] == [False, False, True]


def test_a_repeat_is_answered_at_once_and_is_no_trial(problem: Timed) -> None:
    algorithm = Listed(problem, [1, 1, 2])
    run = simulate(problem, algorithm, n_trials=2, n_workers=1, clock=instant)
    assert [trial.key for trial in run.trials] == ["1000-r8", "1100-r8"]
    assert run.trials[1].started == 11
    assert run.n_repeats == 1
    assert algorithm.told[0].values == algorithm.told[1].values


def test_a_repeat_of_a_running_trial_is_answered_with_it(problem: Timed) -> None:
    algorithm = Listed(problem, [3, 3, 1])
    run = simulate(problem, algorithm, n_trials=2, n_workers=2, clock=instant)
    assert [trial.ended for trial in run.trials] == [11, 31]
    assert [told.layout.key for told in algorithm.told] == ["1000-r8", "1110-r8", "1110-r8"]


def test_one_repeat_too_many_is_run_again(problem: Timed) -> None:
    algorithm = Listed(problem, [1] * (MAX_REPEATS + 2))
    run = simulate(problem, algorithm, n_trials=2, n_workers=1, clock=instant)
    assert run.n_repeats == MAX_REPEATS
    assert [trial.key for trial in run.trials] == ["1000-r8", "1000-r8"]


def test_an_algorithm_without_suggestions_is_an_error(problem: Timed) -> None:
    with pytest.raises(RuntimeError, match="after 1 trials nothing runs"):
        simulate(problem, Listed(problem, [1]), n_trials=2, n_workers=1, clock=instant)


def test_random_measures_every_layout_once(problem: Timed) -> None:
    n = problem.space.n_canonical
    run = simulate(problem, Random(problem, seed=3), n_trials=n, clock=instant)
    rows = CanonicalRows(problem.space)
    keys = {rows.decode(row).key for row in rows.all()}
    assert sorted(trial.key for trial in run.trials) == sorted(keys)
    assert run.n_repeats == 0
    again = simulate(problem, Random(problem, seed=3), n_trials=n, clock=instant)
    assert again.trials == run.trials
